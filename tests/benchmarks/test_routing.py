"""Made-up routing is what a router could have done, and the service takes it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batch import to_batch
from service.predictions import parse
from specmoe.bench.routing import made_up, request_body
from speculation.runtime import Speculator
from tests.toy_version import TOY_SPEC, toy_stored
from traces.spec import RoutingSpec


@st.composite
def specs(draw: st.DrawFn) -> RoutingSpec:
    experts = draw(st.integers(2, 64))
    return RoutingSpec("made-up", draw(st.integers(2, 12)), experts, draw(st.integers(1, min(8, experts))))


@given(spec=specs(), batch=st.integers(1, 5), seed=st.integers(0, 100))
def test_experts_of_a_seen_layer_are_different_and_in_range(spec: RoutingSpec, batch: int, seed: int) -> None:
    seen = spec.num_layers // 2
    routing = made_up(spec, batch=batch, seen=seen, seed=seed)
    assert routing.experts.shape == routing.gates.shape == (batch, spec.num_layers, spec.top_k)
    assert (np.diff(np.sort(routing.experts[:, :seen]), axis=-1) > 0).all()
    assert ((routing.experts[:, :seen] >= 0) & (routing.experts[:, :seen] < spec.num_experts)).all()
    assert (routing.experts[:, seen:] == -1).all()
    assert (routing.gates > 0).all()


@pytest.mark.parametrize("seen", [0, 2, 4])
def test_the_model_takes_it(seen: int) -> None:
    speculator = Speculator(toy_stored(), provider="cpu")
    routing = made_up(TOY_SPEC, batch=3, seen=seen, seed=1)
    predicted = speculator.predict(
        speculator.initial_state(3), routing.token_ids, routing.experts, routing.gates
    )
    assert predicted.shape == (3, TOY_SPEC.num_layers, TOY_SPEC.num_experts)


def test_a_request_says_what_the_arrays_say() -> None:
    routing = made_up(TOY_SPEC, batch=1, seen=2, seed=3)
    body = json.dumps(request_body("toy", 2, routing, seen=2)).encode()
    batch = to_batch(parse(body), TOY_SPEC)
    assert batch.gates is not None
    np.testing.assert_array_equal(batch.token_ids, routing.token_ids)
    np.testing.assert_array_equal(batch.experts, routing.experts)
    np.testing.assert_array_equal(batch.gates[:, :2], routing.gates[:, :2])


def test_every_run_measures_the_same() -> None:
    first, second = (made_up(TOY_SPEC, batch=2, seen=2, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.experts, second.experts)
