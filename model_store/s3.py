"""A store on S3: the folder store's layout as keys below `s3://bucket/prefix`.

A bucket renames nothing, so a version exists from the moment its manifest does: the graphs are written first,
the manifest last, each only where no such key is (`If-None-Match: *`). Aliases are changed only where nobody
changed them meanwhile (`If-Match`). Credentials, region and endpoint come from the usual AWS environment.

    AWS_ENDPOINT_URL=http://127.0.0.1:9000 specmoe store list --store s3://models/specmoe
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from model_store import documents
from model_store.documents import ALIASES, MAX_DOCUMENT_BYTES, MAX_FILE_BYTES, VERSION_NAME
from model_store.errors import FileRefused, ModelNotFound, PublishConflict, StoreUnavailable, VersionNotFound
from model_store.manifest import MANIFEST, PREDICT, Draft, GraphName, Manifest
from model_store.store import StoredVersion, select
from traces.spec import MODEL_NAME

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LOCATION = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(?:/[A-Za-z0-9._-]+)*)/?")
MISSING = {"NoSuchKey", "404"}
# Somebody else wrote the key first, or is writing it now.
LOST_RACE = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
MAX_ATTEMPTS = 10


class S3Store:
    """A `model_store.store.Store` below a prefix of a bucket, which must exist."""

    def __init__(self, client: S3Client, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    @classmethod
    def open(cls, location: str) -> S3Store:
        """`s3://bucket/prefix`. Raises StoreUnavailable where it is no such location."""
        found = LOCATION.fullmatch(location)
        if found is None:
            raise StoreUnavailable(
                f"{location!r} is no location on S3.", remedy="Write s3://bucket or s3://bucket/prefix."
            )
        return cls(_client(), found["bucket"], found["prefix"].strip("/"))

    @property
    def location(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def models(self) -> list[str]:
        return sorted({model for model, _, name in self._keys("") if name == MANIFEST})

    def versions(self, model: str) -> list[int]:
        keys = self._keys(f"{documents.check_model(model)}/")
        numbers = sorted(int(version) for _, version, name in keys if name == MANIFEST)
        if not numbers:
            known = ", ".join(self.models()) or "none yet"
            raise ModelNotFound(f"No version of {model} in {self.location}.", remedy=f"It holds: {known}.")
        return numbers

    def aliases(self, model: str) -> dict[str, int]:
        return self._tagged_aliases(documents.check_model(model))[0]

    def resolve(self, model: str, selector: int | str | None = None) -> int:
        return select(model, selector, self.versions(model), self.aliases(model))

    def manifest(self, model: str, version: int) -> Manifest:
        select(model, version, self.versions(model), {})
        key = f"{model}/{version}/{MANIFEST}"
        content, _ = self._required(key, MAX_DOCUMENT_BYTES)
        return documents.read_manifest(content, model=model, version=version, origin=self._origin(key))

    def load(self, model: str, version: int) -> StoredVersion:
        manifest = self.manifest(model, version)
        graphs: dict[GraphName, bytes] = {}
        for name in manifest.files:
            key = f"{model}/{version}/{name}"
            content, _ = self._required(key, MAX_FILE_BYTES)
            graphs[name] = documents.check_bytes(manifest, name, content, origin=self._origin(key))
        return StoredVersion(manifest, graphs)

    def publish(
        self, draft: Draft, graphs: Mapping[GraphName, bytes], *, aliases: Sequence[str] = ()
    ) -> Manifest:
        model = draft.spec.model
        for alias in aliases:
            documents.check_alias(alias)
        # Numbers that a crashed publisher began, or that an alias remembers, are not given again.
        begun = [int(version) for _, version, _ in self._keys(f"{model}/")]
        version = 1 + max([0, *begun, *self.aliases(model).values()])
        for number in range(version, version + MAX_ATTEMPTS):
            manifest = documents.complete(draft, number, graphs)
            # The first file, the same for all, claims the number: whoever loses it writes nothing more there.
            graph_files = sorted(graphs.items(), key=lambda file: file[0] != PREDICT)
            files = [*graph_files, (MANIFEST, documents.written(manifest))]
            if all(self._put_new(f"{model}/{number}/{name}", content) for name, content in files):
                break
        else:
            raise PublishConflict(
                f"Versions {version} to {number} of {model} were taken while publishing.",
                remedy="Try again when fewer publish at once.",
            )
        for alias in aliases:
            self.set_alias(model, alias, manifest.version)
        return manifest

    def set_alias(self, model: str, alias: str, version: int) -> None:
        documents.check_alias(alias)
        self.load(model, version)
        self._change_aliases(model, lambda aliases: aliases | {alias: version})

    def remove_alias(self, model: str, alias: str) -> None:
        documents.check_alias(alias)
        self.versions(model)

        def without(aliases: dict[str, int]) -> dict[str, int]:
            if alias not in aliases:
                known = ", ".join(sorted(aliases)) or "none"
                raise VersionNotFound(f"{model} has no alias {alias!r}.", remedy=f"Its aliases: {known}.")
            return {name: version for name, version in aliases.items() if name != alias}

        self._change_aliases(model, without)

    def _change_aliases(self, model: str, change: Callable[[dict[str, int]], dict[str, int]]) -> None:
        for _ in range(MAX_ATTEMPTS):
            aliases, tag = self._tagged_aliases(model)
            content = documents.written(dict(sorted(change(aliases).items())))
            if self._put(f"{model}/{ALIASES}", content, unless_changed_since=tag):
                return
        raise PublishConflict(
            f"The aliases of {model} were changed by others {MAX_ATTEMPTS} times in a row.",
            remedy="Look at them and try again.",
        )

    def _tagged_aliases(self, model: str) -> tuple[dict[str, int], str | None]:
        """(aliases, the tag of what they were read from; None where there are none yet)."""
        found = self._get(f"{model}/{ALIASES}", MAX_DOCUMENT_BYTES)
        if found is None:
            return {}, None
        return documents.read_aliases(found[0], origin=self._origin(f"{model}/{ALIASES}")), found[1]

    def _keys(self, below: str) -> Iterator[tuple[str, str, str]]:
        """(model, version, file) of every key that can belong to a version."""
        with self._translated():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + below
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    parts = entry["Key"].removeprefix(self._prefix).split("/")
                    if (
                        len(parts) == 3
                        and MODEL_NAME.fullmatch(parts[0])
                        and VERSION_NAME.fullmatch(parts[1])
                    ):
                        yield parts[0], parts[1], parts[2]

    def _required(self, key: str, most_bytes: int) -> tuple[bytes, str]:
        found = self._get(key, most_bytes)
        if found is None:
            raise FileRefused(f"{self._origin(key)} is missing.", remedy="Publish the version anew.")
        return found

    def _get(self, key: str, most_bytes: int) -> tuple[bytes, str] | None:
        """(content, tag); None where there is no such key. Raises FileRefused above `most_bytes`."""
        with self._translated():
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            except ClientError as error:
                if error.response["Error"]["Code"] in MISSING:
                    return None
                raise
            if found["ContentLength"] > most_bytes:
                raise FileRefused(
                    f"{self._origin(key)} has {found['ContentLength']} bytes, expected {most_bytes} at most.",
                    remedy="Publish the version anew.",
                )
            return found["Body"].read(), found["ETag"]

    def _put_new(self, key: str, content: bytes) -> bool:
        return self._put(key, content, unless_changed_since=None)

    def _put(self, key: str, content: bytes, *, unless_changed_since: str | None) -> bool:
        """Whether it was written: only over what has this tag, or, with None, over nothing."""
        key = self._prefix + key
        with self._translated():
            try:
                if unless_changed_since is None:
                    self._client.put_object(Bucket=self._bucket, Key=key, Body=content, IfNoneMatch="*")
                else:
                    self._client.put_object(
                        Bucket=self._bucket, Key=key, Body=content, IfMatch=unless_changed_since
                    )
            except ClientError as error:
                if error.response["Error"]["Code"] in LOST_RACE:
                    return False
                raise
        return True

    def _origin(self, key: str) -> str:
        return f"{self.location}/{key}"

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(
                f"The store at {self.location} cannot be used: {error}",
                remedy="Check the bucket, AWS_ENDPOINT_URL, the region and the credentials.",
            ) from error


def _client() -> S3Client:
    # A server of one's own rarely has a host name for every bucket.
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": "path" if own_endpoint else "auto"},
    )
    return boto3.client("s3", config=config)
