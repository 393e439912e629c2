"""Hidden states beside a trace: read as they were written, found for any prefix, refused where damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training.toy_hidden import SIZE, save_shards, toy_hidden_trace
from tests.training.toy_run import save_npz
from traces.errors import TraceError, TraceFormatError
from traces.files import load
from traces.hidden import ROUTERS, HiddenStates, mapped
from traces.trace import check, concatenate

TRACE = toy_hidden_trace((5, 1, 7))
assert TRACE.hidden is not None
HIDDEN = TRACE.hidden


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    came = load(save_shards(TRACE, tmp_path / "t"), hidden=True).hidden
    assert came is not None and came.routers is not None and came.size == SIZE
    assert np.array_equal(came.states, HIDDEN.states)
    assert np.array_equal(came.routers, HIDDEN.routers)


def test_they_are_read_only_where_asked_for_and_there(tmp_path: Path) -> None:
    assert load(save_shards(TRACE, tmp_path / "t")).hidden is None
    assert load(save_shards(replace(TRACE, hidden=None), tmp_path / "u"), hidden=True).hidden is None
    assert load(save_npz(TRACE, tmp_path / "t.npz"), hidden=True).hidden is None


def test_the_temporary_file_is_gone_while_it_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_shards(TRACE, tmp_path / "t")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    came = load(folder, hidden=True).hidden
    assert came is not None and isinstance(came.states, np.memmap)
    assert not list((tmp_path / "tmp").iterdir()) and came.states[3, 2, 1] == HIDDEN.states[3, 2, 1]


@pytest.mark.parametrize("seen", range(TRACE.spec.num_layers + 1))
def test_the_newest_one_is_that_of_the_last_router_that_ran(seen: int) -> None:
    tokens = np.arange(TRACE.num_tokens)
    expected = [
        HIDDEN.states[token, seen - 1]
        if seen
        else (np.zeros(SIZE) if token in TRACE.starts else HIDDEN.states[token - 1, -1])
        for token in tokens
    ]
    assert np.array_equal(HIDDEN.newest(TRACE.starts, tokens, seen), expected)
    by_prefix = HIDDEN.newest(TRACE.starts, tokens[:, None], np.arange(TRACE.spec.num_layers + 1))
    assert np.array_equal(by_prefix[:, seen], expected)


def test_they_follow_their_sequences() -> None:
    both = concatenate([TRACE.select([2]), TRACE])
    assert both.hidden is not None and both.hidden.routers is HIDDEN.routers
    assert np.array_equal(both.hidden.states, np.concatenate([HIDDEN.states[6:], HIDDEN.states]))
    assert concatenate([TRACE, replace(TRACE, hidden=None)]).hidden is None


def test_those_of_different_routers_do_not_go_together() -> None:
    other = replace(TRACE, hidden=HiddenStates(HIDDEN.states))
    with pytest.raises(TraceError, match="different routers"):
        concatenate([TRACE, other])


def test_too_few_of_them_are_refused() -> None:
    with pytest.raises(TraceError, match=r"hidden states are \[12, 4, 24\], expected \[13, 4\] first"):
        check(replace(TRACE, hidden=HiddenStates(HIDDEN.states[1:])), "it")


def test_what_is_no_number_is_refused() -> None:
    states = HIDDEN.states.copy()
    states[3, 1, 2] = np.nan
    with pytest.raises(TraceError, match="no finite number"):
        mapped([states], states.shape, "it")
    with pytest.raises(TraceFormatError, match="bytes of hidden states, expected"):
        mapped([HIDDEN.states[1:]], HIDDEN.states.shape, "it")


def test_a_full_disk_is_told_with_what_would_be_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "wb"))  # noqa: SIM115, PTH123
    with pytest.raises(TraceError, match=r"No space left on device; they take 2,496 bytes\. Set TMPDIR"):
        mapped([HIDDEN.states], HIDDEN.states.shape, "it")


@pytest.mark.parametrize(
    "content",
    [
        np.zeros((4, 8, SIZE), np.float32),
        np.zeros((4, 8, SIZE + 1), np.float64),
        np.full((4, 8, SIZE + 1), np.nan, np.float32),
        np.zeros((4, 8, 9 * SIZE), np.float32),
        np.array([{}], dtype=object),
        b"no array",
        b"",
    ],
    ids=["shape", "dtype", "not a number", "too large", "pickled", "damaged", "empty"],
)
def test_routers_that_do_not_fit_are_refused(content: np.ndarray | bytes, tmp_path: Path) -> None:
    folder = save_shards(TRACE, tmp_path / "t")
    if isinstance(content, bytes):
        (folder / ROUTERS).write_bytes(content)
    else:
        np.save(folder / ROUTERS, content, allow_pickle=True)
    with pytest.raises(TraceFormatError, match=r"routers\.npy cannot be read: .* record it again"):
        load(folder, hidden=True)
