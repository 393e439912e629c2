"""A store in a folder: `<root>/<model>/<version>/` beside `<root>/<model>/aliases.json`.

A version is written into a hidden sibling folder, flushed to the disk and renamed: a reader sees all of it or
nothing, and of two publishers with the same number one is refused by the file system and takes the next.

    specmoe publish runs/mine/export --store ./store && specmoe store list --store ./store
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from model_store import documents
from model_store.documents import ALIASES, MAX_DOCUMENT_BYTES, MAX_FILE_BYTES, VERSION_NAME
from model_store.errors import FileRefused, ModelNotFound, PublishConflict, StoreUnavailable, VersionNotFound
from model_store.manifest import MANIFEST, Draft, GraphName, Manifest
from model_store.store import StoredVersion, select
from traces.spec import MODEL_NAME

TEMPORARY = ".publishing-"
# Publishing takes seconds, so what is an hour old was left behind by a crash.
LEFTOVER_SECONDS = 3600
# Each lost race means that another publisher got a number, so ten in a row is a storm.
MAX_ATTEMPTS = 10


class FolderStore:
    """A `model_store.store.Store` in a folder, which publishing makes where it is missing."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    @property
    def location(self) -> str:
        return str(self._root)

    def models(self) -> list[str]:
        names = sorted(name for name in self._folders() if MODEL_NAME.fullmatch(name))
        return [name for name in names if self._numbers(name)]

    def versions(self, model: str) -> list[int]:
        numbers = self._numbers(documents.check_model(model))
        if not numbers:
            known = ", ".join(self.models()) or "none yet"
            raise ModelNotFound(f"No version of {model} in {self.location}.", remedy=f"It holds: {known}.")
        return numbers

    def aliases(self, model: str) -> dict[str, int]:
        path = self._root / documents.check_model(model) / ALIASES
        with self._translated():
            if not path.exists():
                return {}
        return documents.read_aliases(self._read(path, MAX_DOCUMENT_BYTES), origin=str(path))

    def resolve(self, model: str, selector: int | str | None = None) -> int:
        return select(model, selector, self.versions(model), self.aliases(model))

    def manifest(self, model: str, version: int) -> Manifest:
        path = self._folder(model, version) / MANIFEST
        content = self._read(path, MAX_DOCUMENT_BYTES)
        return documents.read_manifest(content, model=model, version=version, origin=str(path))

    def load(self, model: str, version: int) -> StoredVersion:
        manifest = self.manifest(model, version)
        folder = self._folder(model, version)
        graphs = {
            name: documents.check_bytes(
                manifest, name, self._read(folder / name, MAX_FILE_BYTES), origin=str(folder / name)
            )
            for name in manifest.files
        }
        return StoredVersion(manifest, graphs)

    def publish(
        self, draft: Draft, graphs: Mapping[GraphName, bytes], *, aliases: Sequence[str] = ()
    ) -> Manifest:
        model = draft.spec.model
        for alias in aliases:
            documents.check_alias(alias)
        with self._translated():
            (self._root / model).mkdir(parents=True, exist_ok=True)
            self._remove_leftovers(model)
            manifest = self._publish_next(draft, graphs)
        for alias in aliases:
            self.set_alias(model, alias, manifest.version)
        return manifest

    def set_alias(self, model: str, alias: str, version: int) -> None:
        documents.check_alias(alias)
        self.load(model, version)
        with self._aliases_locked(model):
            self._replace_aliases(model, self.aliases(model) | {alias: version})

    def remove_alias(self, model: str, alias: str) -> None:
        documents.check_alias(alias)
        self.versions(model)
        with self._aliases_locked(model):
            aliases = self.aliases(model)
            if alias not in aliases:
                known = ", ".join(sorted(aliases)) or "none"
                raise VersionNotFound(f"{model} has no alias {alias!r}.", remedy=f"Its aliases: {known}.")
            del aliases[alias]
            self._replace_aliases(model, aliases)

    def _numbers(self, model: str) -> list[int]:
        """Version numbers by folder name alone; none where the model's folder is missing."""
        return sorted(int(name) for name in self._folders(model) if VERSION_NAME.fullmatch(name))

    def _folders(self, below: str = "") -> list[str]:
        with self._translated():
            if not self._root.is_dir():
                raise StoreUnavailable(
                    f"There is no store at {self.location}.",
                    remedy="Check the location, or publish to it: that makes it.",
                )
            folder = self._root / below
            return [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []

    def _folder(self, model: str, version: int) -> Path:
        return self._root / model / str(select(model, version, self.versions(model), {}))

    def _read(self, path: Path, most_bytes: int) -> bytes:
        """A regular file of at most `most_bytes` that lies in the store, links followed; else FileRefused."""
        with self._translated():
            if not path.resolve().is_relative_to(self._root.resolve()):
                raise FileRefused(
                    f"{path} leads to {path.resolve()}, outside the store.",
                    remedy="Put the file itself there: a store's files lie in the store.",
                )
            if not path.exists():
                raise FileRefused(f"{path} is missing.", remedy="Publish the version anew.")
            found = path.stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size > most_bytes:
                raise FileRefused(
                    f"{path} is no regular file of at most {most_bytes} bytes ({found.st_size} bytes).",
                    remedy="Publish the version anew.",
                )
            return path.read_bytes()

    def _publish_next(self, draft: Draft, graphs: Mapping[GraphName, bytes]) -> Manifest:
        model = draft.spec.model
        # A number that an alias still remembers is not given to other bytes.
        version = 1 + max([0, *self._numbers(model), *self.aliases(model).values()])
        temporary = self._root / model / f"{TEMPORARY}{secrets.token_hex(8)}"
        temporary.mkdir()
        try:
            for name, content in graphs.items():
                _write(temporary / name, content)
            for number in range(version, version + MAX_ATTEMPTS):
                manifest = documents.complete(draft, number, graphs)
                _write(temporary / MANIFEST, documents.written(manifest))
                _flush_folder(temporary)
                if _renamed(temporary, temporary.with_name(str(number))):
                    return manifest
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        raise PublishConflict(
            f"Versions {version} to {version + MAX_ATTEMPTS - 1} of {model} were taken while publishing.",
            remedy="Try again when fewer publish at once.",
        )

    def _remove_leftovers(self, model: str) -> None:
        for path in (self._root / model).glob(f"{TEMPORARY}*"):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def _replace_aliases(self, model: str, aliases: dict[str, int]) -> None:
        path = self._root / model / ALIASES
        temporary = path.with_name(f".{ALIASES}-{secrets.token_hex(8)}")
        _write(temporary, documents.written(dict(sorted(aliases.items()))))
        temporary.replace(path)
        _flush_folder(path.parent)

    @contextmanager
    def _aliases_locked(self, model: str) -> Iterator[None]:
        """One writer of aliases at a time, of any process; readers need no lock. A crash frees it."""
        import fcntl  # POSIX only, and reading a store needs none of it

        with self._translated(), (self._root / model / ".aliases.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(
                f"The store at {self.location} cannot be used: {error.strerror} ({error.filename}).",
                remedy="Check the path, its permissions and the space left.",
            ) from error


def _renamed(temporary: Path, target: Path) -> bool:
    """Whether the version got its number. The file system lets one folder only have a name."""
    try:
        temporary.rename(target)
    except OSError:
        if target.exists():
            return False
        raise
    _flush_folder(target.parent)
    return True


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Make names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
