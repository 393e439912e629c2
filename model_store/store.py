"""What a store of versions can do, and how to open one: a folder, or a bucket on S3.

export -> publish() -> <store>/<model>/<version>/ -> load() -> speculation

specmoe store list --store FOLDER
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from model_store.documents import VERSION_NAME, check_alias
from model_store.errors import StoreError, StoreUnavailable, VersionNotFound
from model_store.manifest import Draft, GraphName, Manifest

BUNDLED = Path(__file__).parent / "bundled"
PRODUCTION = "production"


@dataclass(frozen=True)
class StoredVersion:
    """A version in memory, every byte checked. graphs: the manifest's files, each an ONNX graph."""

    manifest: Manifest
    graphs: Mapping[GraphName, bytes] = field(repr=False)


class Store(Protocol):
    """Versions of predictors by model and number, and aliases that point to them.

    Every method raises a `model_store.errors.StoreError`: StoreUnavailable where the store cannot be reached,
    ModelNotFound, VersionNotFound, and a VersionBroken for what is there but not what was published.
    """

    @property
    def location(self) -> str:
        """Where it is, as `open_store` takes it."""

    def models(self) -> list[str]:
        """Names of the models that have a version, sorted."""

    def versions(self, model: str) -> list[int]:
        """All version numbers of a model, oldest first, whether they are sound or not."""

    def aliases(self, model: str) -> dict[str, int]:
        """alias -> version."""

    def resolve(self, model: str, selector: int | str | None = None) -> int:
        """The version meant by a number, an alias, or nothing (`production`, else the newest)."""

    def manifest(self, model: str, version: int) -> Manifest:
        """What a version says of itself."""

    def load(self, model: str, version: int) -> StoredVersion:
        """A version, every byte checked against its manifest."""

    def publish(
        self, draft: Draft, graphs: Mapping[GraphName, bytes], *, aliases: Sequence[str] = ()
    ) -> Manifest:
        """Make it the next version, whole or not at all, then let the aliases point to it."""

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Let an alias point to a version, which must load."""

    def remove_alias(self, model: str, alias: str) -> None:
        """Forget an alias. Raises VersionNotFound where there is none."""


def open_store(location: str | Path | None = None) -> Store:
    """The store at a folder or at `s3://bucket/prefix`; None: the versions shipped with the project.

    Opening touches nothing: a store that is not there says so when it is read, and is made by publishing.
    """
    if isinstance(location, str) and location.startswith("s3://"):
        try:
            from model_store.s3 import S3Store
        except ModuleNotFoundError as error:
            raise StoreUnavailable(
                f"{location} is on S3, which needs {error.name}.",
                remedy="Install it from the repository: pip install '.[s3]'",
            ) from error
        return S3Store.open(location)
    from model_store.folder import FolderStore

    return FolderStore(BUNDLED if location is None else Path(location))


def select(
    model: str, selector: int | str | None, versions: Sequence[int], aliases: Mapping[str, int]
) -> int:
    """The version meant by `selector`, as `Store.resolve` says. `versions`: oldest first, not empty."""
    if selector is None:
        selector = PRODUCTION if PRODUCTION in aliases else versions[-1]
    if isinstance(selector, str) and VERSION_NAME.fullmatch(selector):
        selector = int(selector)
    version = selector if isinstance(selector, int) else aliases.get(check_alias(selector))
    if version is None or version not in versions:
        asked = f"version {selector}" if version == selector else f"alias {selector!r}"
        dangling = f" (it points to version {version})" if version not in (None, selector) else ""
        known = ", ".join([*map(str, versions), *sorted(aliases)])
        raise VersionNotFound(f"{model} has no {asked}{dangling}.", remedy=f"Choose one of {known}.")
    return version


def broken(store: Store, model: str) -> Iterator[tuple[str, StoreError]]:
    """What is wrong with a model: (version or alias, reason), after reading every byte of it."""
    versions = store.versions(model)
    for version in versions:
        try:
            store.load(model, version)
        except StoreError as error:
            yield str(version), error
    try:
        aliases = store.aliases(model)
    except StoreError as error:
        yield "aliases", error
        return
    for alias in sorted(aliases):
        try:
            store.resolve(model, alias)
        except StoreError as error:
            yield alias, error
