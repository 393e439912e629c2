"""One sequence in place gives what a batch of one gives that is copied at every call."""

from __future__ import annotations

import numpy as np
import pytest

from speculation.errors import GraphFailed
from speculation.runtime import Speculator, load_speculator
from speculation.single import NO_LAYER
from speculation.steps import Steps
from tests.speculation.replayed import Replayed
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC, toy_stored

SPECULATOR = Speculator(toy_stored(steps=True), provider="cpu")
TOLERANCE = 1e-5


def test_token_after_token_it_is_what_predict_says() -> None:
    single, expected = Steps(SPECULATOR).single(), Replayed(SPECULATOR)
    assert single
    for seed in range(3):
        (token_id,), (experts,), (gates,) = routed(seed, 1, TOY_SPEC, seen=TOY_SPEC.num_layers)
        single.begin(int(token_id))
        expected.start(int(token_id))
        probabilities = single.step(NO_LAYER, NO_LAYER, 1.0)
        for layer in range(TOY_SPEC.num_layers - 1):
            np.testing.assert_allclose(
                probabilities[0, layer:], expected.probabilities()[layer:], atol=TOLERANCE
            )
            probabilities = single.step(layer, experts[layer], gates[layer])
            expected.tell(experts[layer : layer + 1], gates[layer : layer + 1])
        expected.tell(experts[-1:], gates[-1:])
        single.advance(int(token_id), experts, gates)


def test_what_a_graph_stops_at_is_said() -> None:
    single = Steps(load_speculator("gpt-oss-20b", provider="cpu")).single()
    assert single
    with pytest.raises(GraphFailed, match="stopped at what it was given"):
        single.step(10**6, 0, 1.0)
