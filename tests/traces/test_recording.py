"""An interrupted recording keeps whole sequences; when it is resumed it ends as an uninterrupted one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.traces.made_up import TOY, files, made_up_trace, same
from tests.traces.test_parquet import NEW_FOLDER
from traces.errors import TraceError, TraceFormatError
from traces.parquet import read, read_hidden
from traces.recording import RecordingWriter, sequences_in
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace

LENGTHS = (4, 1, 3, 5, 2, 2, 5, 1)
WHOLE = made_up_trace(lengths=LENGTHS, prefill=True)
HIDDEN = np.random.default_rng(0).normal(size=(WHOLE.num_tokens, 3, 4)).astype(np.float16)


def writer(folder: Path, keep: int = 0, **changes: Any) -> RecordingWriter:
    options = {
        "gates": True,
        "token_ids": True,
        "prefill": True,
        "hidden_size": 4,
        "provenance": {"source": "made up"},
        "max_shard_tokens": 6,
    } | changes
    return RecordingWriter(folder, options.pop("spec", TOY), keep=keep, **options)


def append(to: RecordingWriter, sequences: range) -> None:
    for index in sequences:
        to.append(WHOLE.select([index]), HIDDEN[WHOLE.sequence(index)])


def record(folder: Path, begin: int, end: int, *, interrupted: bool = True) -> None:
    try:
        with writer(folder, keep=begin) as to:
            append(to, range(begin, end))
            if interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


@NEW_FOLDER
@given(st.lists(st.integers(0, len(LENGTHS)), max_size=4).map(sorted))
def test_a_resumed_recording_is_the_same_bytes_as_an_uninterrupted_one(
    tmp_path: Path, stops: list[int]
) -> None:
    folders = tmp_path / "resumed", tmp_path / "at once"
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    done = 0
    for stop in stops:
        record(folders[0], done, stop)
        done = stop
        assert sequences_in(folders[0]) == done
    record(folders[0], done, len(LENGTHS), interrupted=False)
    record(folders[1], 0, len(LENGTHS), interrupted=False)
    resumed, at_once = ([(file.name, file.read_bytes()) for file in files(folder)] for folder in folders)
    assert resumed == at_once


def test_what_was_recorded_comes_back_with_its_hidden_states(tmp_path: Path) -> None:
    record(tmp_path, 0, len(LENGTHS), interrupted=False)
    assert same(read(tmp_path), WHOLE)
    assert np.array_equal(np.concatenate(list(read_hidden(tmp_path))), HIDDEN)


def test_an_interrupted_recording_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    record(tmp_path, 0, 5)
    with pytest.raises(TraceFormatError, match=r"rest is missing.*--resume"):
        read(tmp_path)


def test_a_killed_recording_goes_on_behind_its_last_whole_shard(tmp_path: Path) -> None:
    killed = writer(tmp_path).__enter__()
    append(killed, range(5))
    assert sequences_in(tmp_path) == 4
    with writer(tmp_path, keep=4) as to:
        append(to, range(4, len(LENGTHS)))
    assert same(read(tmp_path), WHOLE)


def test_fewer_sequences_than_there_are_may_be_kept(tmp_path: Path) -> None:
    record(tmp_path, 0, len(LENGTHS))
    with writer(tmp_path, keep=2) as to:
        assert (to.sequences, to.tokens) == (2, 5)
    assert same(read(tmp_path), WHOLE.select([0, 1]))


def test_a_finished_recording_may_be_gone_on_with(tmp_path: Path) -> None:
    record(tmp_path, 0, 3, interrupted=False)
    record(tmp_path, 3, len(LENGTHS), interrupted=False)
    assert same(read(tmp_path), WHOLE)


def test_an_interruption_before_the_first_sequence_leaves_nothing(tmp_path: Path) -> None:
    record(tmp_path / "t", 0, 0)
    assert sequences_in(tmp_path / "t") == 0
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"provenance": {"source": "a book"}}, "source is made up, not a book"),
        ({"spec": RoutingSpec("other", 3, 8, 2)}, "it is of RoutingSpec.model='toy'"),
        ({"hidden_size": 0}, "with sequence, domain, token_id, prefill, experts, gates, hidden"),
    ],
    ids=["provenance", "model", "columns"],
)
def test_another_recording_is_not_gone_on_with(tmp_path: Path, changes: Any, reason: str) -> None:
    record(tmp_path, 0, 5)
    before = [file.read_bytes() for file in files(tmp_path)]
    with pytest.raises(TraceError, match=reason), writer(tmp_path, keep=5, **changes):
        pass
    assert [file.read_bytes() for file in files(tmp_path)] == before


def test_without_anything_to_keep_the_folder_must_be_free(tmp_path: Path) -> None:
    record(tmp_path, 0, 5)
    with pytest.raises(TraceError, match="exists already"):
        writer(tmp_path)


def test_a_trace_that_does_not_fit_leaves_what_was_appended_before(tmp_path: Path) -> None:
    malformed: RoutingTrace = replace(WHOLE, domains=("a",))
    with pytest.raises(TraceError, match="starts"), writer(tmp_path) as to:
        append(to, range(3))
        to.append(malformed, HIDDEN)
    assert sequences_in(tmp_path) == 3
