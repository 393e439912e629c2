"""The project's own trace format on disk: a folder of Parquet shards, written and read piece by piece.

A set of shards may be larger than memory on both ways. Each shard appears whole or not at all; a set that
lacks one, or whose writing was interrupted, is refused. docs/trace-format.md describes columns and footer.

    specmoe traces import recording.npz --out traces/
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16, Int64, Shaped

from traces.errors import TraceError, TraceFormatError
from traces.hidden import HiddenStates, mapped, read_routers
from traces.shard import Header, Rows, Shard, joined, rows_per_group, schema, schema_of, to_table, to_trace
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, check, starts_of

SUFFIX = ".parquet"
MAX_SHARD_TOKENS = 1 << 17


def read(path: Path) -> RoutingTrace:
    """The whole trace of a folder of shards, or of a set's only shard. Raises as `read_batches`."""
    (trace,) = read_batches(path, sys.maxsize)
    return trace


def read_batches(path: Path, max_tokens: int) -> Iterator[RoutingTrace]:
    """The trace in order, in pieces of at most `max_tokens` tokens, checked, one in memory at a time.

    A piece ends between sequences. Only a sequence longer than `max_tokens` is cut, and each of its pieces
    looks like a sequence of its own.

    Raises TraceFormatError where a shard is damaged, foreign or missing, TraceError where its rows are
    malformed, naming the file; before the first piece where the footers tell.
    """
    if max_tokens < 1:
        raise TraceError(f"max_tokens is {max_tokens}, expected 1 or more.", remedy="Ask for larger pieces.")
    shards = _opened(path)
    spec = shards[0].header.spec
    held: list[Rows] = []
    for block in _blocks(shards):
        held.append(block)
        if sum(map(len, held)) > max_tokens:
            rows = joined(held)
            while len(rows) > max_tokens:
                cut = _cut(rows, max_tokens)
                yield to_trace(rows[:cut], spec)
                rows = rows[cut:]
            held = [rows]
    yield to_trace(joined(held), spec)


def _cut(rows: Rows, max_tokens: int) -> int:
    """How many of the first rows make a piece: up to a sequence's end where there is one."""
    begin = int(np.searchsorted(rows.sequence, rows.sequence[max_tokens]))
    return begin or max_tokens


def read_hidden(path: Path) -> Iterator[Float16[np.ndarray, "n L H"]]:
    """The hidden states of a set's tokens in order, in pieces of some 30 MB; nothing where it has none.

    Raises TraceFormatError where a shard is damaged, foreign or missing.
    """
    for shard in _opened(path):
        yield from shard.hidden()


def read_with_hidden(path: Path) -> RoutingTrace:
    """As `read`, and the hidden states with it, where the set has some. Raises TraceError besides."""
    trace, size = read(path), _opened(path)[0].hidden_size
    if not size:
        return trace
    shape = (trace.num_tokens, trace.spec.num_layers, size)
    routers = read_routers(path if path.is_dir() else path.parent, trace.spec, size)
    return replace(trace, hidden=HiddenStates(mapped(read_hidden(path), shape, str(path)), routers))


def _opened(path: Path) -> list[Shard]:
    """The shards of a set, their footers checked against one another."""
    shards = opened_so_far(path)
    if not shards[-1].header.last:
        raise TraceFormatError(
            f"{shards[-1].path} is the last shard found, but the recording goes on after it: the rest is"
            " missing.",
            remedy="Import it again into an empty folder; finish what `specmoe collect` began by --resume.",
        )
    return shards


def opened_so_far(path: Path) -> list[Shard]:
    """The shards of a set that may still grow, their footers checked against one another."""
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise TraceError(f"{path} has no {SUFFIX} files.", remedy="Give a folder of shards.")
    shards = [Shard(file) for file in files]
    first_token = 0
    for number, shard in enumerate(shards):
        _check_place(shard, number, first_token, shards[0], more=number + 1 < len(shards))
        first_token += shard.num_tokens
    return shards


def _check_place(shard: Shard, number: int, first_token: int, first: Shard, *, more: bool) -> None:
    header = shard.header
    if header.spec != first.header.spec or header.provenance != first.header.provenance:
        raise TraceFormatError(
            f"{shard.path} ({header.spec}, {dict(header.provenance)}) is of another recording than"
            f" {first.path} ({first.header.spec}, {dict(first.header.provenance)}).",
            remedy="Keep each import in a folder of its own.",
        )
    if not shard.columns.equals(first.columns):
        raise TraceFormatError(
            f"{shard.path} has other columns than {first.path}.", remedy="Import the recording again."
        )
    if (header.shard, header.first_token) != (number, first_token):
        raise TraceFormatError(
            f"{shard.path} is shard {header.shard} and begins at token {header.first_token}, expected"
            f" shard {number} at token {first_token}: one is missing or not the one that was written.",
            remedy=f"Find {shard_name(number)}, or import the recording again.",
        )
    if header.last and more:
        raise TraceFormatError(
            f"{shard.path} ends the recording, but more shards follow.",
            remedy="Import the recording again into an empty folder.",
        )


def _blocks(shards: Sequence[Shard]) -> Iterator[Rows]:
    """All rows of all shards, in order. A sequence may go on in the next shard; none may be skipped."""
    sequence, domain = -1, ""
    for shard in shards:
        row = 0
        for block in shard.blocks():
            sequences = np.append(sequence, block.sequence)
            domains = np.append(np.array([domain], dtype=object), block.domain)
            _check_order(sequences, domains, shard.path, row - 1)
            sequence, domain = int(sequences[-1]), domains[-1]
            row += len(block)
            yield block


def _check_order(
    sequences: Int64[np.ndarray, "n"], domains: Shaped[np.ndarray, "n"], path: Path, first_row: int
) -> None:
    steps = np.diff(sequences)
    wrong = (steps < 0) | (steps > 1) | ((steps == 0) & (domains[1:] != domains[:-1]))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise TraceError(
            f"{path}: token {first_row + at + 1} is of sequence {sequences[at + 1]}, {domains[at + 1]!r},"
            f" after sequence {sequences[at]}, {domains[at]!r}; expected the same with the same domain,"
            " or the next.",
            remedy="Import the recording again.",
        )


def shard_name(number: int) -> str:
    return f"part-{number:06d}{SUFFIX}"


def check_free(folder: Path) -> None:
    """Raise TraceError where `folder` is anything but absent or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TraceError(
            f"{folder} exists already and is not an empty folder.",
            remedy="Choose another, or remove it first; nothing is overwritten.",
        )


class TraceWriter:
    """Writes a set of shards into `folder`, which must be empty or absent, one row group in memory at a time.

    with TraceWriter(folder, spec, gates=True, token_ids=False, provenance={"source": "a.npz"}) as writer:
        writer.append(trace)

    gates, token_ids, prefill: whether the traces to come have them. hidden_size: width H of the hidden states
    that come along with them, 0 for none. provenance: where the routing comes from.
    max_shard_tokens: a shard's tokens at most; a sequence is only cut where it alone is longer.
    Leaving the block finishes the set; leaving it by an error removes what was written. A shard appears
    under its name only when it is complete and on disk.
    """

    def __init__(
        self,
        folder: Path,
        spec: RoutingSpec,
        *,
        gates: bool,
        token_ids: bool,
        provenance: Mapping[str, str],
        prefill: bool = False,
        hidden_size: int = 0,
        max_shard_tokens: int = MAX_SHARD_TOKENS,
    ) -> None:
        if max_shard_tokens < 1:
            raise TraceError(
                f"max_shard_tokens is {max_shard_tokens}, expected 1 or more.", remedy="Allow larger shards."
            )
        self._check_folder(folder)
        self._folder, self._spec, self._provenance = folder, spec, dict(provenance)
        self._columns = schema(
            spec, gates=gates, token_ids=token_ids, prefill=prefill, hidden_size=hidden_size
        )
        self._group_rows = rows_per_group(spec, hidden_size)
        self._max_shard_tokens = max_shard_tokens
        self._made_folder = not folder.exists()
        self._held: list[pa.Table] = []
        self._shard = self._first_token = self._shard_tokens = self._sequence = 0

    def _check_folder(self, folder: Path) -> None:
        check_free(folder)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._begin_shard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._sequence:
                raise TraceError(f"There is nothing to write into {self._folder}.", remedy="Append a trace.")
            if kind is None:
                self._finish_shard(last=True)
        except BaseException:
            self._remove()
            raise
        if kind is not None:
            self._remove()

    def append(self, trace: RoutingTrace, hidden: Float16[np.ndarray, "N L H"] | None = None) -> None:
        """Write the trace's sequences after those before, and the hidden states of its tokens with them.

        Raises TraceError where it is malformed, of another model, or has not the columns announced.
        """
        check(trace, "The trace to write")
        columns = schema_of(trace, 0 if hidden is None else hidden.shape[-1])
        if trace.spec != self._spec or columns != self._columns:
            raise TraceError(
                f"The trace to write is of {trace.spec} with {', '.join(columns.names)};"
                f" those before are of {self._spec} with {', '.join(self._columns.names)}.",
                remedy="Import each into a folder of its own.",
            )
        for index in range(trace.num_sequences):
            self._append_sequence(trace, index, hidden)

    def _append_sequence(
        self, trace: RoutingTrace, index: int, hidden: Float16[np.ndarray, "N L H"] | None
    ) -> None:
        rows = trace.sequence(index)
        for start in range(rows.start, rows.stop, self._max_shard_tokens):
            part = slice(start, min(start + self._max_shard_tokens, rows.stop))
            length = part.stop - part.start
            if self._shard_tokens and self._shard_tokens + length > self._max_shard_tokens:
                self._finish_shard(last=False)
                self._begin_shard()
            rows_of = _part(trace, part, trace.domains[index])
            self._held.append(to_table(rows_of, self._sequence, None if hidden is None else hidden[part]))
            self._shard_tokens += length
        self._write_groups(everything=False)
        self._sequence += 1

    def _write_groups(self, *, everything: bool) -> None:
        """Write what fills row groups, or everything that is held."""
        group = self._group_rows
        held = sum(part.num_rows for part in self._held)
        rows = held if everything else held - held % group
        if rows:
            table = pa.concat_tables(self._held)
            self._file.write_table(table.slice(0, rows), row_group_size=group)
            self._held = [table.slice(rows)]

    def _begin_shard(self) -> None:
        self._file = pq.ParquetWriter(
            self._temporary, self._columns, compression="zstd", write_page_checksum=True
        )

    def _finish_shard(self, *, last: bool) -> None:
        self._write_groups(everything=True)
        header = Header(self._spec, self._provenance, self._shard, self._first_token, last)
        self._file.add_key_value_metadata(header.to_metadata())
        self._file.close()
        _sync(self._temporary)
        self._temporary.replace(self._folder / shard_name(self._shard))
        _sync(self._folder)
        self._held = []
        self._first_token += self._shard_tokens
        self._shard, self._shard_tokens = self._shard + 1, 0

    def _remove(self) -> None:
        """Take away what was written, and the folder where it was made here."""
        with suppress(OSError, pa.ArrowException):  # it has failed already, on a full disk perhaps
            self._file.close()
        self._temporary.unlink(missing_ok=True)
        for number in range(self._shard):
            (self._folder / shard_name(number)).unlink(missing_ok=True)
        if self._made_folder:
            self._folder.rmdir()

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{shard_name(self._shard)}.tmp"


def _part(trace: RoutingTrace, rows: slice, domain: str) -> RoutingTrace:
    return RoutingTrace(
        spec=trace.spec,
        experts=trace.experts[rows],
        gates=None if trace.gates is None else trace.gates[rows],
        token_ids=None if trace.token_ids is None else trace.token_ids[rows],
        starts=starts_of([rows.stop - rows.start]),
        domains=(domain,),
        prefill=None if trace.prefill is None else trace.prefill[rows],
    )


def _sync(path: Path) -> None:
    """Have the file's or folder's contents on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
