"""What would have been resident: worked out by hand, by another way, and never better than with foresight."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.toy_routing import SPEC, toy_trace
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, starts_of
from training.cache_simulator import (
    Clairvoyant,
    DecayedFrequency,
    LeastRecent,
    Policy,
    capacity_of,
    next_uses,
    pairs_of,
    simulate,
)
from training.errors import EvaluationError


def trace_of(experts: list[list[list[int]]], num_experts: int) -> RoutingTrace:
    """One sequence. experts: by token and layer."""
    array = np.array(experts, np.int16)
    spec = RoutingSpec("toy", array.shape[1], num_experts, array.shape[2])
    return RoutingTrace(spec, array, None, None, starts_of([len(array)]), ("prose",))


def one_layer(*experts: int) -> RoutingTrace:
    """A layer that routes each token to one expert."""
    return trace_of([[[expert]] for expert in experts], num_experts=8)


def policies(trace: RoutingTrace) -> dict[str, Policy]:
    return {
        "lru": LeastRecent(trace.spec),
        "lfu": DecayedFrequency(trace.spec),
        "decayed": DecayedFrequency(trace.spec, 0.8),
        "clairvoyant": Clairvoyant(trace),
    }


@pytest.mark.parametrize(
    ("policy", "hits"),
    # 0 1 0 2: LRU lets 1 go and then, for 1, 0. LFU and foresight keep 0.
    [("lru", 1), ("lfu", 2), ("clairvoyant", 2)],
)
def test_a_small_cache_by_hand(policy: str, hits: int) -> None:
    trace = one_layer(0, 1, 0, 2, 1, 0)
    assert simulate(trace, policies(trace)[policy], 2).hits == hits


def test_counts_that_fade_forget_what_was_popular_long_ago() -> None:
    trace = one_layer(0, 0, 0, 1, 1, 2, 1, 2, 1)
    assert simulate(trace, DecayedFrequency(trace.spec), 2).hits == 4
    assert simulate(trace, DecayedFrequency(trace.spec, 0.5), 2).hits == 6


def test_experts_of_one_layer_do_not_push_out_one_another() -> None:
    # Kept most recent, expert 0 would have to go for 2, were it not needed beside it.
    trace = trace_of([[[0, 1]], [[2, 0]], [[0, 2]]], num_experts=4)
    count = simulate(trace, LeastRecent(trace.spec), 2)
    assert (count.uses, count.hits, count.hit_rate) == (6, 3, 0.5)


def test_layers_share_the_room_unless_each_has_its_own() -> None:
    # Layer 0 changes between two experts, layer 1 needs one.
    trace = trace_of([[[t % 2], [0]] for t in range(10)], num_experts=4)
    assert simulate(trace, LeastRecent(trace.spec), 3).misses == 3
    assert simulate(trace, LeastRecent(trace.spec), 2, by_layer=True).misses == 11


def test_long_traces_do_not_leave_the_range_of_floats() -> None:
    trace = one_layer(*([0, 1, 2, 3] * 500))
    policy = DecayedFrequency(trace.spec, 0.1)
    simulate(trace, policy, 2)
    assert np.isfinite(policy.worth()).all()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, 0.03])
def test_a_share_that_holds_no_layer_is_refused(share: float) -> None:
    with pytest.raises(EvaluationError, match="cache share"):
        capacity_of(SPEC, share)


def test_a_layers_own_room_must_hold_its_experts() -> None:
    with pytest.raises(EvaluationError, match="room for 1"):
        simulate(toy_trace(), LeastRecent(SPEC), 4, by_layer=True)


@st.composite
def traces(draw: st.DrawFn, top_k: int = 2) -> RoutingTrace:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    one = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k, unique=True)
    token = st.lists(one, min_size=layers, max_size=layers)
    return trace_of(draw(st.lists(token, min_size=1, max_size=25)), experts)


@settings(deadline=None, max_examples=30)
@given(traces(), st.data(), st.booleans())
def test_nobody_beats_foresight(trace: RoutingTrace, data: st.DataObject, by_layer: bool) -> None:
    spec = trace.spec
    least = spec.top_k * (spec.num_layers if by_layer else 1)
    capacity = data.draw(st.integers(least, spec.num_layers * spec.num_experts))
    hits = {
        name: simulate(trace, policy, capacity, by_layer=by_layer).hits
        for name, policy in policies(trace).items()
    }
    assert hits["clairvoyant"] == max(hits.values())


@settings(deadline=None, max_examples=30)
@given(traces())
def test_room_for_all_misses_each_expert_once(trace: RoutingTrace) -> None:
    everything = trace.spec.num_layers * trace.spec.num_experts
    for policy in policies(trace).values():
        assert simulate(trace, policy, everything).misses == len(np.unique(pairs_of(trace)))


@settings(deadline=None, max_examples=30)
@given(traces(top_k=1), st.data())
def test_least_recent_is_what_an_ordered_table_keeps(trace: RoutingTrace, data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, trace.spec.num_layers * trace.spec.num_experts))
    table: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for pair in pairs_of(trace).ravel().tolist():
        hits += pair in table
        table[pair] = None
        table.move_to_end(pair)
        if len(table) > capacity:
            table.popitem(last=False)
    assert simulate(trace, LeastRecent(trace.spec), capacity).hits == hits


@settings(deadline=None, max_examples=30)
@given(traces())
def test_next_uses_are_where_a_search_finds_them(trace: RoutingTrace) -> None:
    pairs = pairs_of(trace)
    for (token, layer, slot), found in np.ndenumerate(next_uses(pairs)):
        later = [t for t in range(token + 1, len(pairs)) if pairs[token, layer, slot] in pairs[t, layer]]
        assert found == (later[0] if later else len(pairs))
