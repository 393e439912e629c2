"""Parquet shards: what is written comes back, in pieces too, and a set that is not whole is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import TOY, made_up_trace, same, traces
from traces import shard
from traces.errors import TraceError, TraceFormatError
from traces.parquet import TraceWriter, read, read_batches
from traces.shard import DIGEST_KEY, METADATA_KEY, Shard
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, concatenate

NEW_FOLDER = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder: Path, trace: RoutingTrace, max_shard_tokens: int = 1000, source: str = "made up") -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    with TraceWriter(
        folder,
        trace.spec,
        gates=trace.gates is not None,
        token_ids=trace.token_ids is not None,
        provenance={"source": source},
        max_shard_tokens=max_shard_tokens,
    ) as writer:
        writer.append(trace)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of four shards, of 8, 4, 7 and 3 tokens."""
    folder = write(tmp_path / "shards", made_up_trace(lengths=(5, 3, 4, 7, 3)), max_shard_tokens=8)
    assert [Shard(file).num_tokens for file in files(folder)] == [8, 4, 7, 3]
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@NEW_FOLDER
@given(traces(), st.integers(1, 30))
def test_a_trace_comes_back_as_it_was_written(tmp_path: Path, trace: RoutingTrace, tokens: int) -> None:
    assert same(read(write(tmp_path / "t", trace, max_shard_tokens=tokens)), trace)


@NEW_FOLDER
@given(traces(), st.integers(1, 30), st.integers(1, 30))
def test_pieces_are_bounded_and_make_the_whole(
    tmp_path: Path, trace: RoutingTrace, tokens: int, max_tokens: int
) -> None:
    pieces = list(read_batches(write(tmp_path / "t", trace, max_shard_tokens=tokens), max_tokens))
    assert max(piece.num_tokens for piece in pieces) <= max_tokens
    assert np.array_equal(concatenate(pieces).experts, trace.experts)


@NEW_FOLDER
@given(traces(), st.integers(9, 30))
def test_pieces_split_no_sequence_that_fits(tmp_path: Path, trace: RoutingTrace, max_tokens: int) -> None:
    folder = write(tmp_path / "t", trace, max_shard_tokens=4)  # sequences have nine tokens at most
    assert same(concatenate(list(read_batches(folder, max_tokens))), trace)


def test_a_sequence_longer_than_a_piece_is_cut(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", made_up_trace(lengths=(2, 7, 1)))
    lengths = [np.diff(piece.starts).tolist() for piece in read_batches(folder, 3)]
    assert lengths == [[2], [3], [3], [1, 1]]


def test_reading_in_pieces_holds_a_small_part_of_the_set(tmp_path: Path) -> None:
    whole = made_up_trace(lengths=(250,) * 80)
    folder = write(tmp_path / "t", whole, max_shard_tokens=500)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_batches(folder, 500)]
    assert len(held) == 40
    assert max(held) < sum(file.stat().st_size for file in files(folder)) / 3


def test_appended_traces_follow_one_another(tmp_path: Path) -> None:
    parts = [made_up_trace(seed=seed) for seed in range(3)]
    with TraceWriter(tmp_path / "t", TOY, gates=True, token_ids=True, provenance={}) as writer:
        for part in parts:
            writer.append(part)
    assert same(read(tmp_path / "t"), concatenate(parts))


def test_row_groups_are_filled_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "MAX_ROWS_PER_GROUP", 4)
    folder = write(tmp_path / "t", made_up_trace(lengths=(1,) * 10))
    metadata = pq.read_metadata(files(folder)[0])
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [4, 4, 2]


def test_a_footer_tells_spec_provenance_and_place(shards: Path) -> None:
    header = Shard(files(shards)[1]).header
    assert (header.spec, header.provenance) == (TOY, {"source": "made up"})
    assert (header.shard, header.first_token, header.last) == (1, 8, False)


def test_the_same_trace_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    one, other = (files(write(tmp_path / name, made_up_trace())) for name in ("one", "other"))
    assert one[0].read_bytes() == other[0].read_bytes()


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        TraceWriter(
            tmp_path / "t", TOY, gates=True, token_ids=True, provenance={}, max_shard_tokens=4
        ) as writer,
    ):
        writer.append(made_up_trace(lengths=(4, 4, 4)))
        assert len(files(tmp_path / "t")) == 3  # two shards and the one being written
        raise RuntimeError
    assert files(tmp_path) == []


def test_a_shard_being_written_has_no_name_yet(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", TOY, gates=True, token_ids=True, provenance={}) as writer:
        writer.append(made_up_trace())
        with pytest.raises(TraceError, match=r"has no \.parquet files"):
            read(tmp_path / "t")


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        (made_up_trace(RoutingSpec("other", 3, 8, 2)), "is of RoutingSpec.model='other'"),
        (made_up_trace(gates=False), "with sequence, domain, token_id, experts;"),
        (made_up_trace(token_ids=False), "with sequence, domain, experts, gates;"),
        (replace(made_up_trace(), domains=("a",)), "The trace to write: starts"),
    ],
    ids=["model", "gates", "token ids", "malformed"],
)
def test_a_trace_that_does_not_fit_is_not_written(tmp_path: Path, trace: RoutingTrace, reason: str) -> None:
    with (
        pytest.raises(TraceError, match=reason),
        TraceWriter(tmp_path / "t", TOY, gates=True, token_ids=True, provenance={}) as writer,
    ):
        writer.append(trace)
    assert not (tmp_path / "t").exists()


def test_nothing_is_no_trace(tmp_path: Path) -> None:
    with (
        pytest.raises(TraceError, match="nothing to write"),
        TraceWriter(tmp_path / "t", TOY, gates=True, token_ids=True, provenance={}),
    ):
        pass
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    (tmp_path / "notes").write_text("mine")
    target = tmp_path if kind == "folder" else tmp_path / "notes"
    with pytest.raises(TraceError, match="exists already"):
        TraceWriter(target, TOY, gates=True, token_ids=True, provenance={})
    assert (tmp_path / "notes").read_text() == "mine"


def test_an_empty_folder_may_be_written_into_and_stays_after_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(TraceError),
        TraceWriter(tmp_path, TOY, gates=True, token_ids=True, provenance={}),
    ):
        pass
    assert files(tmp_path) == []


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_are_positive(tmp_path: Path, shards: Path, limit: int) -> None:
    with pytest.raises(TraceError, match="expected 1 or more"):
        next(read_batches(shards, limit))
    with pytest.raises(TraceError, match="expected 1 or more"):
        write(tmp_path / "t", made_up_trace(), max_shard_tokens=limit)


def drop(number: int) -> Callable[[Path], None]:
    return lambda folder: files(folder)[number].unlink()


def truncate(share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = files(folder)[2].read_bytes()
        files(folder)[2].write_bytes(whole[: int(len(whole) * share)])

    return change


def put(content: bytes) -> Callable[[Path], None]:
    return lambda folder: _void(files(folder)[2].write_bytes(content))


def _void(_: object) -> None: ...


def mix(trace: RoutingTrace, source: str) -> Callable[[Path], None]:
    """Another set's third shard, of as many tokens, in the place of this one's."""

    def change(folder: Path) -> None:
        other = write(folder.parent / "other", trace, max_shard_tokens=8, source=source)
        shutil.copy(files(other)[2], files(folder)[2])

    return change


LENGTHS = (5, 3, 4, 7, 3)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        pytest.param(
            drop(0), "part-000001", "is shard 1 .* expected shard 0 at token 0: one is missing", id="first"
        ),
        pytest.param(drop(1), "part-000002", "is shard 2 .* token 12, expected shard 1", id="middle"),
        pytest.param(drop(3), "part-000002", "goes on after it: the rest is missing", id="last"),
        pytest.param(truncate(0), "part-000002", "cannot be read as Parquet", id="emptied"),
        pytest.param(truncate(0.5), "part-000002", "cannot be read as Parquet", id="half"),
        pytest.param(truncate(0.99), "part-000002", "cannot be read as Parquet", id="almost whole"),
        pytest.param(put(b"PAR1 no more PAR1"), "part-000002", "cannot be read as", id="no Parquet"),
        pytest.param(
            mix(made_up_trace(lengths=LENGTHS), "elsewhere"),
            "part-000002",
            "is of another recording",
            id="provenance",
        ),
        pytest.param(
            mix(made_up_trace(replace(TOY, model="other"), LENGTHS), "made up"),
            "part-000002",
            "model='other'.* is of another recording than",
            id="model",
        ),
        pytest.param(
            mix(made_up_trace(lengths=LENGTHS, gates=False), "made up"),
            "part-000002",
            "other columns",
            id="columns",
        ),
        pytest.param(
            mix(made_up_trace(lengths=(5, 2, 4, 7, 3)), "made up"),
            "part-000002",
            "begins at token 11",
            id="tokens",
        ),
        pytest.param(
            mix(made_up_trace(lengths=(5, 3, 3, 1, 7, 3)), "made up"),
            "part-000002",
            "token 0 is of sequence 4, 'domain 0', after sequence 2, 'domain 0'",
            id="sequences",
        ),
    ],
)
def test_a_set_that_is_not_whole_is_refused_with_the_shard(
    shards: Path, damage: Callable[[Path], None], file: str, reason: str
) -> None:
    damage(shards)
    with pytest.raises(TraceError, match=reason) as refusal:
        read(shards)
    assert refusal.value.message.startswith(f"{shards / file}.parquet")


def test_one_shard_of_several_is_no_trace(shards: Path) -> None:
    with pytest.raises(TraceFormatError, match="goes on after it"):
        read(files(shards)[0])


def test_a_shard_after_the_last_is_refused(shards: Path) -> None:
    alone = write(shards.parent / "alone", made_up_trace(lengths=(8,)))
    shutil.copy(files(alone)[0], files(shards)[0])
    with pytest.raises(TraceFormatError, match="ends the recording, but more shards follow"):
        read(shards)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    trace = made_up_trace()
    file = files(write(tmp_path / "t", trace))[0]
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        assert same(read(file), trace)
    except TraceError as error:
        assert error.message.startswith(str(file))


def rewrite(file: Path, table: pa.Table, header: str | None = None) -> Path:
    """The shard with other rows or another footer, its checksum right."""
    text = pq.read_metadata(file).metadata[METADATA_KEY.encode()] if header is None else header.encode()
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA_KEY: text, DIGEST_KEY: hashlib.sha256(text).hexdigest()})
    return file


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A set's only shard."""
    return files(write(tmp_path / "alone", made_up_trace()))[0]


def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(TraceFormatError, match="no routing trace: its footer lacks"):
        read(tmp_path / "x.parquet")


HEADER = {
    "schema_version": 1,
    "spec": {"model": "toy", "num_layers": 3, "num_experts": 8, "top_k": 2},
    "provenance": {},
    "shard": 0,
    "first_token": 0,
    "last": True,
}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        pytest.param("{", "is not understood", id="no JSON"),
        pytest.param("[]", "is not understood", id="list"),
        pytest.param({**HEADER, "schema_version": 2}, "schema version is 2, expected 1", id="version"),
        pytest.param({**HEADER, "more": 1}, "more", id="unknown field"),
        pytest.param({k: v for k, v in HEADER.items() if k != "last"}, "last", id="missing field"),
        pytest.param({**HEADER, "shard": "0"}, "found '0', expected int", id="type"),
        pytest.param({**HEADER, "provenance": None}, "found None, expected dict", id="provenance"),
        pytest.param({**HEADER, "spec": {"model": "toy"}}, "num_layers", id="half a spec"),
        pytest.param({**HEADER, "spec": {**HEADER["spec"], "top_k": 9}}, "top_k is 9", id="spec"),
        pytest.param(
            {**HEADER, "spec": {**HEADER["spec"], "top_k": "2"}}, "is not understood", id="spec type"
        ),
        pytest.param(
            {**HEADER, "spec": {**HEADER["spec"], "top_k": 1}}, "has columns .*expected", id="columns"
        ),
    ],
)
def test_a_footer_that_is_not_understood_is_refused(alone: Path, header: object, reason: str) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    with pytest.raises(TraceFormatError, match=reason):
        read(rewrite(alone, pq.read_table(alone), text))


def test_a_footer_whose_text_was_changed_is_refused(alone: Path) -> None:
    content = alone.read_bytes()
    alone.write_bytes(content.replace(b'"model": "toy"', b'"model": "tov"'))
    with pytest.raises(TraceFormatError, match="checksum does not match"):
        read(alone)


def changed(name: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        field = table.schema.field(name)
        return table.set_column(table.schema.names.index(name), field, pa.array(values, field.type))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            changed("experts", 5, [0, 1, 2, 3, 4, 8]), "token 5, layer 2: expert id is 8", id="expert"
        ),
        pytest.param(
            changed("experts", 5, [0, 1, 2, 2, 4, 5]), "token 5, layer 1: expert 2 .* twice", id="twice"
        ),
        pytest.param(
            changed("gates", 7, [1, 1, 1, 1, 1, float("nan")]), "token 7, layer 2: gate is nan", id="gate"
        ),
        pytest.param(changed("token_id", 2, -2), "token 2: token id is -2", id="token id"),
        pytest.param(changed("domain", 1, "other"), "token 1 is of sequence 0, 'other', after", id="domain"),
        pytest.param(changed("sequence", 2, 5), "token 2 is of sequence 5, 'domain 0', after", id="skipped"),
        pytest.param(
            changed("sequence", 6, 0), "token 6 is of sequence 0, 'domain 0', after", id="backwards"
        ),
        pytest.param(changed("sequence", 0, -1), "token 0 is of sequence -1", id="negative"),
        pytest.param(lambda table: table.slice(0, 0), "has no rows", id="no rows"),
        pytest.param(lambda table: table.drop_columns(["sequence"]), "has columns", id="no sequence"),
        pytest.param(
            lambda table: table.set_column(0, "sequence", table["sequence"].cast(pa.int32())),
            "has columns sequence int32",
            id="type",
        ),
    ],
)
def test_malformed_rows_are_refused_with_file_and_token(
    alone: Path, change: Callable[[pa.Table], pa.Table], reason: str
) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        read(rewrite(alone, change(pq.read_table(alone))))
    assert refusal.value.message.startswith(str(alone))


def test_a_row_group_beyond_the_limit_is_refused(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "MAX_ROWS_PER_GROUP", 7)
    with pytest.raises(TraceFormatError, match="row group 0 has 8 rows"):
        read(alone)
