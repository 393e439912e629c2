"""Reads objects out of JSON, or out of JSON Lines with one a line: responses of a server, say.

A `.json` file holds one object or a list of them. A `Record` knows its place, for refusals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from traces.errors import TraceError, TraceFormatError

LINES = ".jsonl"
# A line, or a whole .json file, is parsed at once: numbers in lists take some ten times their text in memory.
MAX_JSON_BYTES = 256 << 20
MAX_BYTES = 4 << 30
MAX_TOKEN_ID = np.iinfo(np.int32).max

STORE_AGAIN = "Store it again, whole and unchanged."


@dataclass(frozen=True)
class Record:
    """where: "line 3", counted from 1, or "item 3" of a list, counted from 0."""

    path: Path
    where: str
    fields: dict[str, Any]

    def refused(self, what: str, remedy: str) -> TraceError:
        return TraceError(f"{self.path}, {self.where}: {what}", remedy=remedy)

    def token_ids(self, value: Any, name: str) -> Int32[np.ndarray, "n"] | None:
        """A list of token ids; None where there is none."""
        if value is None:
            return None
        if not isinstance(value, list) or not all(
            type(item) is int and 0 <= item <= MAX_TOKEN_ID for item in value
        ):
            raise self.refused(f"{name} is not a list of token ids.", STORE_AGAIN)
        return np.array(value, np.int32)


def read(path: Path) -> Iterator[Record]:
    """The objects of a file, in order. Raises TraceFormatError naming the line that is none."""
    if path.stat().st_size > MAX_BYTES:
        raise TraceFormatError(
            f"{path} has {path.stat().st_size} bytes, {MAX_BYTES} at most are read.",
            remedy="Split it into files of one folder.",
        )
    yield from _lines(path) if path.suffix == LINES else _document(path)


def _lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            if line.strip():
                where = f"line {number}"
                yield _record(path, where, _parsed(path, where, line))


def _document(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        document = _parsed(path, "its JSON", file.read(MAX_JSON_BYTES + 1))
    for number, item in enumerate(document if isinstance(document, list) else [document]):
        yield _record(path, f"item {number}", item)


def _parsed(path: Path, where: str, text: bytes) -> Any:
    if len(text) > MAX_JSON_BYTES:
        raise TraceFormatError(
            f"{path}, {where}: more than {MAX_JSON_BYTES} bytes, which is the most that is read at once.",
            remedy=f"Store each object as a line of its own, in a {LINES} file.",
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceFormatError(
            f"{path}, {where}: no JSON ({error}).",
            remedy=f"Copy the file again. Several objects go into a {LINES} file, one a line.",
        ) from error


def _record(path: Path, where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise TraceFormatError(
            f"{path}, {where}: found {type(value).__name__}, expected an object.", remedy=STORE_AGAIN
        )
    return Record(path, where, value)
