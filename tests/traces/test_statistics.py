"""Usage entropy and temporal locality, against counting by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from tests.traces.made_up import made_up_trace, traces
from traces import statistics
from traces.spec import RoutingSpec
from traces.statistics import temporal_locality, usage, usage_entropy
from traces.trace import RoutingTrace


def naive_locality(trace: RoutingTrace, layer: int) -> float:
    again = [
        expert in trace.experts[token - 1, layer]
        for index in range(trace.num_sequences)
        for token in range(trace.starts[index] + 1, trace.starts[index + 1])
        for expert in trace.experts[token, layer]
    ]
    return float(np.mean(again))


@settings(deadline=None)
@given(traces())
def test_temporal_locality_counts_what_the_previous_token_was_routed_to(trace: RoutingTrace) -> None:
    locality = temporal_locality(trace)
    if np.diff(trace.starts).max() == 1:
        assert locality is None
    else:
        assert locality is not None
        assert locality == pytest.approx([naive_locality(trace, i) for i in range(trace.spec.num_layers)])


def test_a_long_trace_is_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = made_up_trace(lengths=(20, 30))
    whole = temporal_locality(trace)
    monkeypatch.setattr(statistics, "ENTRIES_AT_ONCE", 40)
    assert temporal_locality(trace) == pytest.approx(whole)


@given(traces())
def test_usage_counts_every_routed_expert(trace: RoutingTrace) -> None:
    counts = usage(trace)
    assert counts.shape == (trace.spec.num_layers, trace.spec.num_experts)
    assert (counts.sum(axis=1) == trace.num_tokens * trace.spec.top_k).all()


@given(traces())
def test_usage_entropy_is_a_share(trace: RoutingTrace) -> None:
    entropy = usage_entropy(trace)
    assert (entropy > -1e-12).all()
    assert (entropy < 1 + 1e-12).all()


@pytest.mark.parametrize(
    ("experts", "entropy"), [([0, 1, 2, 3], 1.0), ([2, 2, 2, 2], 0.0), ([0, 0, 3, 3], 0.5)]
)
def test_usage_entropy_of_known_distributions(experts: list[int], entropy: float) -> None:
    trace = made_up_trace(RoutingSpec("toy", 1, 4, 1), (4,))
    trace = replace(trace, experts=np.array(experts, np.int16).reshape(4, 1, 1))
    assert usage_entropy(trace) == pytest.approx([entropy])
