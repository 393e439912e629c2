"""A trace in memory: its sequences, and everything `check` refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.traces.made_up import TOY, made_up_trace, same, traces
from traces import trace as trace_module
from traces.errors import TraceError
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, check, concatenate, starts_of


def changed(name: str, at: Any, value: Any) -> RoutingTrace:
    """A made-up trace with one entry of one array replaced."""
    trace = made_up_trace()
    array = getattr(trace, name).copy()
    array[at] = value
    return replace(trace, **{name: array})


def test_a_sequence_is_a_slice_of_tokens() -> None:
    assert made_up_trace(lengths=(4, 1, 3)).sequence(2) == slice(5, 8)


def test_a_well_formed_trace_passes() -> None:
    check(made_up_trace(), "x.npz")


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        pytest.param(
            changed("experts", (5, 2, 1), 8),
            "x.npz: token 5, layer 2: expert id is 8, expected 0 to 7",
            id="expert too high",
        ),
        pytest.param(
            changed("experts", (0, 0, 0), -1), "token 0, layer 0: expert id is -1", id="expert negative"
        ),
        pytest.param(
            changed("experts", (6, 1), 3),
            "token 6, layer 1: expert 3 is routed twice",
            id="twice",
        ),
        pytest.param(changed("gates", (7, 0, 1), np.nan), "token 7, layer 0: gate is nan", id="gate nan"),
        pytest.param(changed("gates", (7, 0, 1), np.inf), "token 7, layer 0: gate is inf", id="infinite"),
        pytest.param(changed("gates", (1, 2, 0), -0.5), "token 1, layer 2: gate is -0.5", id="gate negative"),
        pytest.param(changed("gates", (1, 2), 0), "token 1, layer 2: all gates are 0", id="no gate"),
        pytest.param(changed("token_ids", 3, -2), "token 3: token id is -2", id="token id"),
        pytest.param(changed("starts", 0, 1), "starts goes from 1 to 8, expected 0 to 8", id="late start"),
        pytest.param(changed("starts", 3, 7), "starts goes from 0 to 7, expected 0 to 8", id="tokens left"),
        pytest.param(changed("starts", 1, 5), "sequence 1 is empty .starts.1. = 5", id="empty sequence"),
        pytest.param(changed("starts", 1, 6), "sequence 1 ends before it begins", id="starts decrease"),
        pytest.param(
            replace(made_up_trace(), domains=("a", "b")),
            r"starts is int64 \[4\], expected int64 \[3\]",
            id="domains",
        ),
        pytest.param(
            replace(made_up_trace(), domains=("a", "", "c")), "sequence 1: domain '' is not", id="no domain"
        ),
        pytest.param(
            replace(made_up_trace(), domains=("a", "b", "\x1b[2J")),
            "sequence 2: domain",
            id="control code",
        ),
        pytest.param(
            replace(made_up_trace(), experts=made_up_trace().experts.astype(np.int64)),
            r"experts is int64 \[8, 3, 2\], expected int16 \[8, 3, 2\]",
            id="dtype",
        ),
        pytest.param(
            replace(made_up_trace(), spec=replace(TOY, num_layers=4)),
            r"int16 \[8, 4, 2\]",
            id="layers",
        ),
        pytest.param(replace(made_up_trace(), gates=np.ones((8, 3, 1), np.float32)), "gates is", id="gates"),
        pytest.param(replace(made_up_trace(), token_ids=np.ones(7, np.int32)), "token_ids is", id="length"),
        pytest.param(made_up_trace(lengths=()), "x.npz has no tokens", id="no tokens"),
    ],
)
def test_a_malformed_trace_is_refused_with_its_origin_and_the_place(trace: RoutingTrace, reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        check(trace, "x.npz")
    assert refusal.value.message.startswith("x.npz")
    assert refusal.value.remedy


def test_a_piece_counts_its_tokens_from_where_it_begins() -> None:
    with pytest.raises(TraceError, match="token 1005, layer 2"):
        check(changed("experts", (5, 2, 1), 8), "x.npz", first_row=1000)


def test_a_long_trace_is_checked_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "ENTRIES_AT_ONCE", 12)
    with pytest.raises(TraceError, match="token 7, layer 0: gate is nan"):
        check(changed("gates", (7, 0, 1), np.nan), "x.npz")


@given(traces(), st.data())
def test_selected_sequences_have_the_tokens_of_their_slices(trace: RoutingTrace, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, trace.num_sequences - 1), min_size=1))
    part = trace.select(chosen)
    check(part, "selected")
    for index, sequence in enumerate(chosen):
        assert np.array_equal(part.experts[part.sequence(index)], trace.experts[trace.sequence(sequence)])
        assert part.domains[index] == trace.domains[sequence]


@pytest.mark.parametrize("indices", [[], [3], [-1]], ids=["none", "too high", "negative"])
def test_selecting_what_is_not_there_is_refused(indices: list[int]) -> None:
    with pytest.raises(TraceError, match="sequence"):
        made_up_trace().select(indices)


@given(traces(), st.data())
def test_concatenated_parts_are_the_whole(trace: RoutingTrace, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, trace.num_sequences))
    parts = [range(cut), range(cut, trace.num_sequences)]
    assert same(concatenate([trace.select(part) for part in parts if len(part)]), trace)


def test_traces_without_token_ids_get_unknown_ones_beside_those_with() -> None:
    whole = concatenate([made_up_trace(lengths=(2,)), made_up_trace(lengths=(3,), token_ids=False)])
    assert whole.token_ids is not None
    assert whole.token_ids[2:].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([], "no trace"),
        ([made_up_trace(), made_up_trace(RoutingSpec("other", 3, 8, 2))], "different models"),
        ([made_up_trace(), made_up_trace(gates=False)], "Some of the traces have gates"),
    ],
    ids=["none", "models", "gates"],
)
def test_traces_that_do_not_go_together_are_refused(others: list[RoutingTrace], reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        concatenate(others)


def test_starts_follow_from_lengths() -> None:
    assert starts_of([2, 3]).tolist() == [0, 2, 5]
