"""A Sequence says what the direct calls say, and keeps tokens and layers in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.errors import CoverageUnknown, InputInvalid
from speculation.ranking import expected_recall, rank
from speculation.runtime import Speculator
from speculation.sequence import Sequence
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC, toy_stored

SPECULATOR = Speculator(toy_stored(), provider="cpu")
LAYERS = TOY_SPEC.num_layers


def replayed(token_ids, experts, gates):
    """The state after these tokens, from scratch."""
    state = SPECULATOR.initial_state(1)
    for token in range(len(token_ids)):
        one = slice(token, token + 1)
        state = SPECULATOR.advance(state, token_ids[one], experts[one], gates[one])
    return state


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, LAYERS - 1))
def test_following_a_sequence_is_replaying_it_from_scratch(seed, tokens, seen):
    token_ids, experts, gates = routed(seed, tokens, TOY_SPEC, seen=LAYERS)
    sequence = Sequence(SPECULATOR)
    for token in range(tokens):
        sequence.start_token(int(token_ids[token]))
        for layer in range(seen if token == tokens - 1 else LAYERS):
            sequence.forecast()
            sequence.observe(experts[token, layer], gates[token, layer])

    current = experts[-1:].copy()
    current[:, seen:] = -1
    state = replayed(token_ids[:-1], experts[:-1], gates[:-1])
    probabilities = SPECULATOR.predict(state, token_ids[-1:], current, gates[-1:])[0]
    for forecast in sequence.forecast(top_n=5):
        expected, ranked = rank(probabilities[forecast.layer], 5)
        assert forecast.experts.tolist() == expected.tolist()
        np.testing.assert_allclose(forecast.probabilities, ranked, atol=1e-6)
        assert forecast.expected_recall == pytest.approx(float(expected_recall(ranked, TOY_SPEC.top_k)))


@pytest.fixture
def sequence() -> Sequence:
    """A sequence with two layers of its first token seen."""
    begun = Sequence(SPECULATOR)
    begun.start_token(7)
    begun.observe([0, 1])
    begun.observe([2, 3], gates=[0.3, 0.7])
    return begun


def test_observing_counts_the_layers():
    sequence = Sequence(SPECULATOR)
    sequence.start_token()
    assert [sequence.observe([0, 1]) for _ in range(LAYERS)] == list(range(LAYERS))
    assert sequence.seen == LAYERS


def test_distances_count_from_the_last_seen_layer(sequence):
    assert [(f.layer, f.distance) for f in sequence.forecast()] == [(2, 1), (3, 2)]


def test_at_the_start_of_a_token_the_first_layer_is_one_ahead():
    sequence = Sequence(SPECULATOR)
    sequence.start_token()
    assert [f.distance for f in sequence.forecast()] == [1, 2, 3, 4]


def test_as_many_experts_as_are_routed_unless_more_are_wanted(sequence):
    assert [len(f.experts) for f in sequence.forecast()] == [2, 2]
    assert [len(f.experts) for f in sequence.forecast(top_n=8)] == [8, 8]


def test_coverage_lists_those_of_the_set(sequence):
    sets = SPECULATOR.coverage_sets(0.95)
    everything = sequence.forecast(top_n=TOY_SPEC.num_experts)
    for forecast, whole in zip(sequence.forecast(coverage=0.95), everything, strict=True):
        probable = np.count_nonzero(whole.probabilities >= sets.threshold[2, forecast.layer])
        n = max(sets.least[2, forecast.layer], probable)
        assert forecast.experts.tolist() == whole.experts[:n].tolist()
        assert len(forecast.probabilities) == n
        expected = expected_recall(forecast.probabilities, TOY_SPEC.top_k)
        assert forecast.expected_recall == pytest.approx(float(expected))


def test_only_the_layers_asked_for_come_and_in_that_order(sequence):
    assert [f.layer for f in sequence.forecast(layers=[3, 2])] == [3, 2]
    assert sequence.forecast(layers=[]) == []


def test_a_finished_token_has_nothing_left_to_forecast(sequence):
    for _ in range(2):
        sequence.observe([0, 1])
    assert sequence.forecast() == []


def test_a_finished_token_is_ended_by_the_next_one(sequence):
    ended = Sequence(SPECULATOR)
    for follower in (sequence, ended):
        if follower is ended:
            follower.start_token(7)
            follower.observe([0, 1])
            follower.observe([2, 3], gates=[0.3, 0.7])
        for _ in range(2):
            follower.observe([4, 5])
    ended.end_token()
    for follower in (sequence, ended):
        follower.start_token(8)
    for one, other in zip(sequence.forecast(), ended.forecast(), strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_sequences_do_not_share_their_state(sequence):
    other = Sequence(SPECULATOR)
    other.start_token(7)
    fresh = [f.probabilities.tolist() for f in other.forecast()]
    for _ in range(2):
        sequence.observe([6, 7])
    sequence.start_token(9)
    assert [f.probabilities.tolist() for f in other.forecast()] == fresh


def test_a_forecast_stays_what_it_was(sequence):
    before = sequence.forecast()
    kept = [(f.experts.tolist(), f.probabilities.tolist()) for f in before]
    sequence.observe([6, 7])
    sequence.forecast()
    assert [(f.experts.tolist(), f.probabilities.tolist()) for f in before] == kept


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        (
            lambda s: s.start_token(),
            "2 layers of this token were observed, expected 4.*Observe all its layers",
        ),
        (lambda s: s.end_token(), "2 layers of this token were observed, expected 4"),
        (lambda s: s.observe([0]), r"experts is int64 \[1\], expected 2 whole numbers"),
        (lambda s: s.observe([0.0, 1.0]), r"experts is float64 \[2\], expected 2 whole numbers"),
        (lambda s: s.observe([[0, 1]]), r"experts is int64 \[1, 2\]"),
        (lambda s: s.observe([3, 3]), r"experts is \[3, 3\], expected different ids from 0 to 7"),
        (lambda s: s.observe([0, 8]), r"experts is \[0, 8\]"),
        (lambda s: s.observe([-1, 0]), r"experts is \[-1, 0\]"),
        (lambda s: s.observe([2**32, 1]), r"experts is \[4294967296, 1\]"),
        (lambda s: s.observe([0, 1], gates=[1.0]), r"gates is \[1.0\], expected 2 finite weights"),
        (lambda s: s.observe([0, 1], gates=[0.5, float("nan")]), r"gates is \[0.5, nan\]"),
        (lambda s: s.observe([0, 1], gates=[float("inf"), 1.0]), r"gates is \[inf, 1.0\]"),
        (lambda s: s.observe([0, 1], gates=[0.5, -0.1]), r"gates is \[0.5, -0.1"),
        (lambda s: s.observe([0, 1], gates=[0.0, 0.0]), r"not all 0"),
        (lambda s: s.forecast(layers=[1]), "Layer 1 was asked for, expected 2 to 3"),
        (lambda s: s.forecast(layers=[4]), "Layer 4 was asked for, expected 2 to 3"),
        (lambda s: s.forecast(top_n=0), "0 experts of a layer were asked for, expected 1 to 8"),
        (lambda s: s.forecast(top_n=9), "9 experts of a layer were asked for, expected 1 to 8"),
        (lambda s: s.forecast(top_n=2, coverage=0.9), r"Both top_n 2 and coverage 0.9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_and_changes_nothing(sequence, do, reason):
    before = [f.probabilities.tolist() for f in sequence.forecast()]
    with pytest.raises(InputInvalid, match=reason):
        do(sequence)
    assert [f.probabilities.tolist() for f in sequence.forecast()] == before


def test_coverage_beyond_the_tables_is_refused(sequence):
    with pytest.raises(CoverageUnknown, match=r"Coverage 0\.999"):
        sequence.forecast(coverage=0.999)


def test_more_layers_than_there_are_cannot_be_observed(sequence):
    for _ in range(2):
        sequence.observe([0, 1])
    with pytest.raises(InputInvalid, match=r"All 4 layers of this token were observed.*start_token"):
        sequence.observe([0, 1])


@pytest.mark.parametrize(
    "do", [lambda s: s.observe([0, 1]), lambda s: s.forecast(), lambda s: s.end_token()], ids=str
)
def test_nothing_goes_before_the_first_token(do):
    with pytest.raises(InputInvalid, match="No token has begun"):
        do(Sequence(SPECULATOR))
