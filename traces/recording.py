"""Writes a recording that may be interrupted: what was appended stays, in whole shards, to be gone on with.

The shards are those of `traces.parquet`. An interrupted set lacks the last one, so nobody takes it for whole.
Opened again, it goes on behind the last whole sequence, and ends as an uninterrupted one would have.

    specmoe collect MODEL --text book.txt --out traces/ --resume
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from traces.errors import TraceError
from traces.parquet import SUFFIX, TraceWriter, check_free, opened_so_far
from traces.shard import Shard
from traces.spec import RoutingSpec


def sequences_in(folder: Path) -> int:
    """How many sequences a recording holds so far; 0 where there is none.

    Raises TraceFormatError where a shard is damaged, foreign or missing.
    """
    return _sequences(opened_so_far(folder)[-1]) if _shards(folder) else 0


class RecordingWriter(TraceWriter):
    """A TraceWriter that keeps what it has written, and goes on behind the first `keep` sequences of it.

    with RecordingWriter(folder, spec, keep=sequences_in(folder), gates=True, ...) as writer:
        writer.append(trace)

    keep: how many sequences of those in `folder` stay; what is behind them goes when the first shard is
    finished. 0: the folder must be empty or absent. max_shard_tokens: no sequence may be longer.
    `sequences`, `tokens`: how many there are so far.

    Leaving the block finishes the set. Leaving it by an error or Ctrl-C finishes the shard, not the set.
    Raises TraceError where the shards there are of another recording.
    """

    def __init__(self, folder: Path, *args: Any, keep: int, **kwargs: Any) -> None:
        self._keep = keep
        super().__init__(folder, *args, **kwargs)

    @property
    def spec(self) -> RoutingSpec:
        return self._spec

    @property
    def sequences(self) -> int:
        return self._sequence

    @property
    def tokens(self) -> int:
        return self._first_token + self._shard_tokens

    def _check_folder(self, folder: Path) -> None:
        if not self._keep:
            check_free(folder)

    def __enter__(self) -> Self:
        if self._keep:
            self._take_up()
        return super().__enter__()

    def _take_up(self) -> None:
        """Go on in the shard in which the last sequence that is kept ends."""
        shards = opened_so_far(self._folder)
        self._check_same(shards[0])
        while len(shards) > 1 and _first_sequence(shards[-1]) >= self._keep:
            shards.pop().path.unlink()
        shard = shards[-1]
        for _ in shard.blocks():  # checks every row
            pass
        table = pq.read_table(shard.path, page_checksum_verification=True).replace_schema_metadata(None)
        kept = pc.less(table["sequence"], self._keep)
        self._held = [table.filter(kept)]
        self._shard, self._first_token = len(shards) - 1, shard.header.first_token
        self._shard_tokens, self._sequence = self._held[0].num_rows, self._keep

    def _check_same(self, shard: Shard) -> None:
        header = shard.header
        if (header.spec, header.provenance, shard.columns) != (self._spec, self._provenance, self._columns):
            differing = {
                name: f"{header.provenance.get(name)}, not {self._provenance.get(name)}"
                for name in sorted(header.provenance.keys() | self._provenance.keys())
                if header.provenance.get(name) != self._provenance.get(name)
            }
            told = "; ".join(f"{name} is {what}" for name, what in differing.items())
            told = told or f"it is of {header.spec} with {', '.join(shard.columns.names)}"
            raise TraceError(
                f"{self._folder} holds another recording: {told}.",
                remedy="Go on with the same model, texts and options, or choose another folder.",
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self._sequence:
            super().__exit__(kind, error, trace)
            return
        try:
            self._finish_shard(last=False)
        except (OSError, pa.ArrowException):  # a full disk, perhaps: the shards before are whole
            self._remove()

    def _remove(self) -> None:
        """Take away what is not whole, and everything only where there is nothing whole."""
        if not self._sequence:
            super()._remove()
            return
        with suppress(OSError, pa.ArrowException):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []


def _first_sequence(shard: Shard) -> int:
    return int(next(shard.blocks()).sequence[0])


def _sequences(shard: Shard) -> int:
    """How many sequences there are up to the end of this shard."""
    last = -1
    for rows in shard.blocks():
        last = int(rows.sequence[-1])
    return last + 1
