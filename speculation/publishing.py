"""From an export to a published version: only what was run here, and answered as promised, is published.

training's export -> FOLDER/{predict.onnx, advance.onnx, ..., draft.json} -> publish_export() -> store

specmoe publish FOLDER --store ./store --alias production
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model_store.documents import MAX_DOCUMENT_BYTES, MAX_FILE_BYTES, complete, read_draft
from model_store.errors import FileRefused
from model_store.manifest import ADVANCE, BEGIN, OUTLOOK, PREDICT, STEP, Draft, GraphName, Manifest
from model_store.store import Store, StoredVersion
from speculation.golden import check_golden
from speculation.runtime import Speculator

DRAFT = "draft.json"


def publish_export(folder: Path, store: Store, *, aliases: Sequence[str] = ()) -> Manifest:
    """Check an export, run it, and make it the next version of its model; then move the aliases to it.

    Raises FileRefused, ManifestInvalid, GraphRefused, GoldenMismatch before anything is written, and what
    `Store.publish` raises.
    """
    draft, unpublished = read_export(folder)
    check_golden(Speculator(unpublished, provider="cpu", origin=str(folder)))
    return store.publish(draft, unpublished.graphs, aliases=aliases)


def read_export(folder: Path) -> tuple[Draft, StoredVersion]:
    """The draft of an export, and the export as a store would hold it.

    Raises FileRefused, ManifestInvalid.
    """
    draft = read_draft(_read(folder / DRAFT, MAX_DOCUMENT_BYTES), origin=str(folder / DRAFT))
    graphs = {name: _read(folder / name, MAX_FILE_BYTES) for name in _graphs_of(draft)}
    # The number is given by the store; until then it is the first of its kind.
    return draft, StoredVersion(complete(draft, 1, graphs), graphs)


def _graphs_of(draft: Draft) -> list[GraphName]:
    """The graphs that a draft describes."""
    names: list[GraphName] = [PREDICT, ADVANCE]
    if draft.token:
        names += [BEGIN, STEP]
    if draft.outlook is not None:
        names.append(OUTLOOK)
    return names


def _read(path: Path, most_bytes: int) -> bytes:
    if not path.is_file():
        raise FileRefused(
            f"{path} is missing.",
            remedy=f"Name a folder with {DRAFT} and all the graphs it describes, as export writes it.",
        )
    if path.stat().st_size > most_bytes:
        raise FileRefused(
            f"{path} has {path.stat().st_size} bytes, expected {most_bytes} at most.",
            remedy="Export a smaller predictor: it has to run in microseconds anyway.",
        )
    return path.read_bytes()
