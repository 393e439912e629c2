"""Reads what an inference server answered, as it was stored: JSON, or JSON Lines with one response a line.

A `.json` file holds one response or a list of them. A `Response` knows its place, for refusals.
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

STORE_AGAIN = "Store the responses again, whole and unchanged."


@dataclass(frozen=True)
class Response:
    """where: "line 3", or "response 3" of a list, counted from 1 and 0."""

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


def read(path: Path) -> Iterator[Response]:
    """The responses of a file, in order. Raises TraceFormatError naming the line that is none."""
    if path.stat().st_size > MAX_BYTES:
        raise TraceFormatError(
            f"{path} has {path.stat().st_size} bytes, {MAX_BYTES} at most are read.",
            remedy="Split it into files of one folder.",
        )
    yield from _lines(path) if path.suffix == LINES else _document(path)


def _lines(path: Path) -> Iterator[Response]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            if line.strip():
                where = f"line {number}"
                yield _response(path, where, _parsed(path, where, line))


def _document(path: Path) -> Iterator[Response]:
    with path.open("rb") as file:
        document = _parsed(path, "its JSON", file.read(MAX_JSON_BYTES + 1))
    for number, item in enumerate(document if isinstance(document, list) else [document]):
        yield _response(path, f"response {number}", item)


def _parsed(path: Path, where: str, text: bytes) -> Any:
    if len(text) > MAX_JSON_BYTES:
        raise TraceFormatError(
            f"{path}, {where}: more than {MAX_JSON_BYTES} bytes, which is the most that is read at once.",
            remedy=f"Store each response as a line of its own, in a {LINES} file.",
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceFormatError(
            f"{path}, {where}: no JSON ({error}).",
            remedy=f"Copy the file again. Several responses go into a {LINES} file, one a line.",
        ) from error


def _response(path: Path, where: str, value: Any) -> Response:
    if not isinstance(value, dict):
        raise TraceFormatError(
            f"{path}, {where}: found {type(value).__name__}, expected an object.", remedy=STORE_AGAIN
        )
    return Response(path, where, value)
