"""One Parquet shard of the project's own trace format: its columns and what its footer says.

One row is one token. The footer carries the RoutingSpec, where the routing comes from, and the shard's place
among the others, so that a set which is not whole is noticed. `traces.parquet` writes and reads such sets.

    specmoe traces info traces/part-000000.parquet
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float16, Float32, Int16, Int32, Int64, Shaped

from traces.errors import SpecMoEError, TraceFormatError
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, check

SCHEMA_VERSION = 1
METADATA_KEY = "specmoe.trace"
# Parquet has checksums for its pages, none for what the footer says.
DIGEST_KEY = "specmoe.trace.sha256"
MAX_ROWS_PER_GROUP = 8192
# A row group is the least that is held in memory: routed experts (with gates, 6 bytes each) it may have.
MAX_ENTRIES_PER_GROUP = 1 << 22
MAX_GROUP_BYTES = 1 << 30
MAX_HIDDEN_BYTES_PER_GROUP = 1 << 25

# What a damaged Parquet file raises, depending on where the damage is.
DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError)

COPY_AGAIN = "Copy the file again or import the recording again; it is damaged or of another kind."


@dataclass(frozen=True)
class Header:
    """What a shard's footer says.

    provenance: free pairs of where the routing comes from; the same in all shards of a set.
    shard: the shard's place in the set, from 0. first_token: tokens in the shards before it.
    last: whether the set ends with it.
    """

    spec: RoutingSpec
    provenance: Mapping[str, str]
    shard: int
    first_token: int
    last: bool

    def to_metadata(self) -> dict[str, str]:
        text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, sort_keys=True)
        return {METADATA_KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes]) -> Header:
        """Raises KeyError, ValueError, TypeError or SpecError where it is not what `to_metadata` makes."""
        text = metadata[METADATA_KEY.encode()]
        if hashlib.sha256(text).hexdigest().encode() != metadata[DIGEST_KEY.encode()]:
            raise ValueError("its checksum does not match.")
        fields = json.loads(text)
        if (version := fields.pop("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"schema version is {version}, expected {SCHEMA_VERSION}.")
        header = cls(**fields | {"spec": RoutingSpec(**fields["spec"])})
        kinds = (header.shard, int), (header.first_token, int), (header.last, bool), (header.provenance, dict)
        for value, kind in kinds:
            if type(value) is not kind:
                raise ValueError(f"found {value!r}, expected {kind.__name__}.")
        return header


@dataclass(frozen=True)
class Rows:
    """Consecutive tokens as they lie in a shard. sequence: its number in the set, counted from 0."""

    sequence: Int64[np.ndarray, "n"]
    domain: Shaped[np.ndarray, "n"]
    experts: Int16[np.ndarray, "n L K"]
    gates: Float32[np.ndarray, "n L K"] | None
    token_ids: Int32[np.ndarray, "n"] | None
    prefill: Bool[np.ndarray, "n"] | None

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(
            self.sequence[rows],
            self.domain[rows],
            self.experts[rows],
            None if self.gates is None else self.gates[rows],
            None if self.token_ids is None else self.token_ids[rows],
            None if self.prefill is None else self.prefill[rows],
        )


def schema(
    spec: RoutingSpec, *, gates: bool, token_ids: bool, prefill: bool = False, hidden_size: int = 0
) -> pa.Schema:
    """The columns of a shard. experts and gates hold a token's L x K values, layer by layer.

    hidden_size: width H of the hidden states, L x H of them a token; 0 without.
    """
    columns = [pa.field("sequence", pa.int64(), False), pa.field("domain", pa.string(), False)]
    if token_ids:
        columns.append(pa.field("token_id", pa.int32(), False))
    if prefill:
        columns.append(pa.field("prefill", pa.bool_(), False))
    columns.append(_listed("experts", pa.int16(), spec.num_layers * spec.top_k))
    if gates:
        columns.append(_listed("gates", pa.float32(), spec.num_layers * spec.top_k))
    if hidden_size:
        columns.append(_listed("hidden", pa.float16(), spec.num_layers * hidden_size))
    return pa.schema(columns)


def _listed(name: str, value: pa.DataType, entries: int) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", value, False), entries), False)


def schema_of(trace: RoutingTrace, hidden_size: int) -> pa.Schema:
    """The columns of a shard of this trace."""
    return schema(
        trace.spec,
        gates=trace.gates is not None,
        token_ids=trace.token_ids is not None,
        prefill=trace.prefill is not None,
        hidden_size=hidden_size,
    )


def rows_per_group(spec: RoutingSpec, hidden_size: int = 0) -> int:
    """Tokens of a row group, so that it stays near 25 MB whatever the model; with hidden states near 60."""
    rows = min(MAX_ROWS_PER_GROUP, MAX_ENTRIES_PER_GROUP // (spec.num_layers * spec.top_k))
    if hidden_size:
        rows = min(rows, MAX_HIDDEN_BYTES_PER_GROUP // (2 * spec.num_layers * hidden_size))
    return max(1, rows)


def to_table(
    trace: RoutingTrace, first_sequence: int, hidden: Float16[np.ndarray, "N L H"] | None = None
) -> pa.Table:
    """The trace as rows of a shard, its sequences numbered from `first_sequence`."""
    layout = schema_of(trace, 0 if hidden is None else hidden.shape[-1])
    numbers = np.repeat(np.arange(trace.num_sequences), np.diff(trace.starts))
    columns = {
        "sequence": pa.array(first_sequence + numbers),
        "domain": pa.array(trace.domains, pa.string()).take(pa.array(numbers)),
        "token_id": pa.array(() if trace.token_ids is None else trace.token_ids),
        "prefill": pa.array(() if trace.prefill is None else trace.prefill),
    }
    for name, values in (("experts", trace.experts), ("gates", trace.gates), ("hidden", hidden)):
        if values is not None:
            flat = pa.array(values.reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, type=layout.field(name).type)
    return pa.Table.from_arrays([columns[name] for name in layout.names], schema=layout)


class Shard:
    """A shard opened for reading, its footer checked; its rows are checked as they are read.

    Raises TraceFormatError naming the file where it is damaged, cut short or no shard of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without pre_buffer=False every open shard keeps all its bytes.
            self._file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
        except DAMAGE as error:
            raise _unreadable(path, error) from error
        self.header = self._header()
        names = set(self._file.schema_arrow.names)
        self.has_gates, self.has_token_ids = "gates" in names, "token_id" in names
        self.has_prefill = "prefill" in names
        self.hidden_size = self._hidden_size() if "hidden" in names else 0
        self.num_tokens: int = self._file.metadata.num_rows
        self._check_columns()

    def blocks(self) -> Iterator[Rows]:
        """All rows in order, at most a row group at a time, checked."""
        first_row = 0
        try:
            columns = [name for name in self._file.schema_arrow.names if name != "hidden"]
            for batch in self._file.iter_batches(rows_per_group(self.header.spec), columns=columns):
                rows = self._rows(batch)
                check(to_trace(rows, self.header.spec), str(self.path), first_row=first_row)
                first_row += len(rows)
                yield rows
        except DAMAGE as error:
            raise _unreadable(self.path, error) from error
        if first_row != self.num_tokens:
            raise TraceFormatError(
                f"{self.path} holds {first_row} tokens, expected {self.num_tokens}.", remedy=COPY_AGAIN
            )

    def hidden(self) -> Iterator[Float16[np.ndarray, "n L H"]]:
        """The hidden states of all rows in order, a row group at a time; nothing where it has none."""
        shape = (-1, self.header.spec.num_layers, self.hidden_size)
        rows = rows_per_group(self.header.spec, self.hidden_size)
        try:
            for batch in self._file.iter_batches(rows, columns=["hidden"]) if self.hidden_size else ():
                yield batch["hidden"].flatten().to_numpy().reshape(shape)
        except DAMAGE as error:
            raise _unreadable(self.path, error) from error

    def _hidden_size(self) -> int:
        column = self._file.schema_arrow.field("hidden").type
        entries = column.list_size if pa.types.is_fixed_size_list(column) else 0
        return max(1, entries // self.header.spec.num_layers)

    @property
    def columns(self) -> pa.Schema:
        return self._file.schema_arrow.remove_metadata()

    def _header(self) -> Header:
        metadata = self._file.metadata.metadata or {}
        if METADATA_KEY.encode() not in metadata:
            raise TraceFormatError(
                f"{self.path} is a Parquet file, but no routing trace: its footer lacks {METADATA_KEY}.",
                remedy="Only what `specmoe traces import` wrote can be read; import the recording.",
            )
        try:
            return Header.from_metadata(metadata)
        except (ValueError, TypeError, KeyError, SpecMoEError) as error:
            raise TraceFormatError(
                f"{self.path}: its footer's {METADATA_KEY} is not understood: {error}", remedy=COPY_AGAIN
            ) from error

    def _check_columns(self) -> None:
        if not self.num_tokens:
            raise TraceFormatError(f"{self.path} has no rows.", remedy=COPY_AGAIN)
        expected = schema(
            self.header.spec,
            gates=self.has_gates,
            token_ids=self.has_token_ids,
            prefill=self.has_prefill,
            hidden_size=self.hidden_size,
        )
        found = self.columns
        if not found.equals(expected):
            raise TraceFormatError(
                f"{self.path} has columns {_named(found)}, expected {_named(expected)}.", remedy=COPY_AGAIN
            )
        for index in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(index)
            if group.num_rows > MAX_ROWS_PER_GROUP or group.total_byte_size > MAX_GROUP_BYTES:
                raise TraceFormatError(
                    f"{self.path}: row group {index} has {group.num_rows} rows and {group.total_byte_size}"
                    f" bytes, expected {MAX_ROWS_PER_GROUP} rows, {MAX_GROUP_BYTES} bytes at most.",
                    remedy=COPY_AGAIN,
                )

    def _rows(self, batch: pa.RecordBatch) -> Rows:
        shape = (batch.num_rows, self.header.spec.num_layers, self.header.spec.top_k)
        domains = batch["domain"].dictionary_encode()
        names = np.array(domains.dictionary.to_pylist(), dtype=object)
        return Rows(
            sequence=batch["sequence"].to_numpy(),
            domain=names[domains.indices.to_numpy()],
            experts=batch["experts"].flatten().to_numpy().reshape(shape),
            gates=batch["gates"].flatten().to_numpy().reshape(shape) if self.has_gates else None,
            token_ids=batch["token_id"].to_numpy() if self.has_token_ids else None,
            prefill=batch["prefill"].to_numpy(zero_copy_only=False) if self.has_prefill else None,
        )


def to_trace(rows: Rows, spec: RoutingSpec) -> RoutingTrace:
    """Rows as a trace: a sequence for each run of equal sequence numbers."""
    begins = np.flatnonzero(np.diff(rows.sequence, prepend=rows.sequence[0] - 1))
    return RoutingTrace(
        spec=spec,
        experts=rows.experts,
        gates=rows.gates,
        token_ids=rows.token_ids,
        starts=np.append(begins, len(rows)).astype(np.int64),
        domains=tuple(rows.domain[begins]),
        prefill=rows.prefill,
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of shards of one set, one after another."""
    gates = [part.gates for part in parts if part.gates is not None]
    token_ids = [part.token_ids for part in parts if part.token_ids is not None]
    prefill = [part.prefill for part in parts if part.prefill is not None]
    return Rows(
        np.concatenate([part.sequence for part in parts]),
        np.concatenate([part.domain for part in parts]),
        np.concatenate([part.experts for part in parts]),
        np.concatenate(gates) if gates else None,
        np.concatenate(token_ids) if token_ids else None,
        np.concatenate(prefill) if prefill else None,
    )


def _named(columns: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in columns)


def _unreadable(path: Path, error: Exception) -> TraceFormatError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TraceFormatError(f"{path} cannot be read as Parquet: {reason}", remedy=COPY_AGAIN)
