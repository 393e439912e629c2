"""Parquet shards: what is written comes back, in pieces too, and nothing is overwritten or left half."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import TOY, files, made_up_trace, same, traces, write_shards
from traces import shard
from traces.errors import TraceError
from traces.parquet import TraceWriter, read, read_batches
from traces.shard import Shard
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, concatenate

NEW_FOLDER = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@NEW_FOLDER
@given(traces(), st.integers(1, 30))
def test_a_trace_comes_back_as_it_was_written(tmp_path: Path, trace: RoutingTrace, tokens: int) -> None:
    assert same(read(write_shards(tmp_path / "t", trace, max_shard_tokens=tokens)), trace)


@NEW_FOLDER
@given(traces(), st.integers(1, 30), st.integers(1, 30))
def test_pieces_are_bounded_and_make_the_whole(
    tmp_path: Path, trace: RoutingTrace, tokens: int, max_tokens: int
) -> None:
    pieces = list(read_batches(write_shards(tmp_path / "t", trace, max_shard_tokens=tokens), max_tokens))
    assert max(piece.num_tokens for piece in pieces) <= max_tokens
    assert np.array_equal(concatenate(pieces).experts, trace.experts)


@NEW_FOLDER
@given(traces(), st.integers(9, 30))
def test_pieces_split_no_sequence_that_fits(tmp_path: Path, trace: RoutingTrace, max_tokens: int) -> None:
    folder = write_shards(tmp_path / "t", trace, max_shard_tokens=4)  # sequences have nine tokens at most
    assert same(concatenate(list(read_batches(folder, max_tokens))), trace)


def test_a_sequence_longer_than_a_piece_is_cut(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "t", made_up_trace(lengths=(2, 7, 1)))
    lengths = [np.diff(piece.starts).tolist() for piece in read_batches(folder, 3)]
    assert lengths == [[2], [3], [3], [1, 1]]


def test_reading_in_pieces_holds_a_small_part_of_the_set(tmp_path: Path) -> None:
    whole = made_up_trace(lengths=(250,) * 80)
    folder = write_shards(tmp_path / "t", whole, max_shard_tokens=500)
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
    folder = write_shards(tmp_path / "t", made_up_trace(lengths=(1,) * 10))
    metadata = pq.read_metadata(files(folder)[0])
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [4, 4, 2]


def test_a_footer_tells_spec_provenance_and_place(shards: Path) -> None:
    header = Shard(files(shards)[1]).header
    assert (header.spec, header.provenance) == (TOY, {"source": "made up"})
    assert (header.shard, header.first_token, header.last) == (1, 8, False)


def test_the_same_trace_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    one, other = (files(write_shards(tmp_path / name, made_up_trace())) for name in ("one", "other"))
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
        write_shards(tmp_path / "t", made_up_trace(), max_shard_tokens=limit)
