"""Each predictor by its name: trained, calibrated, exported, published, and asked as the service asks."""

from dataclasses import replace

import numpy as np
import pytest

from speculation.runtime import Speculator
from speculation.steps import Steps, step_through
from tests.training.toy_routing import SPEC, toy_trace
from tests.training.toy_zoo import SMALL, TOP_ONE, TRAINING, published
from training.evaluate import evaluate
from training.presets import PRESETS

AUGMENTED = replace(TRAINING, permute_experts=0.1, drop_layers=0.1, mixup=0.3, noise=0.1)
# The kinds of `interlayer` differ in size alone; `prefix` is in test_export.
CASES = {
    "interlayer-enhanced": (TOP_ONE, replace(TRAINING, restarts=2)),
    "multiscale": (TOP_ONE, TRAINING),
    "ensemble": (SPEC, AUGMENTED),
}


@pytest.fixture(scope="module", params=CASES)
def speculator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Speculator:
    spec, how = CASES[request.param]
    return published(request.param, SMALL[request.param], tmp_path_factory.mktemp("zoo"), spec, how)


def test_every_name_is_tried_here_in_a_size_of_its_own() -> None:
    assert set(SMALL) == set(PRESETS)
    assert all(type(SMALL[name]) is type(preset.config) for name, preset in PRESETS.items())


# One fixture each, and several looks at it: exporting takes seconds.
def test_it_serves_what_it_learnt(speculator: Speculator) -> None:
    manifest, spec = speculator.manifest, speculator.spec
    assert manifest.predictor.name in CASES
    assert manifest.uses_token_ids == (manifest.predictor.name == "ensemble")
    found = evaluate(speculator, toy_trace((40, 30), seed=9, spec=spec)).metrics
    scores = found.distances()["1"]
    assert scores["recall_at_k"] > 1.2 * spec.top_k / spec.num_experts
    assert scores["ece"] < 0.2 and scores["coverage"]["0.9"]["covered"] > 0.75
    _accepts_what_is_unknown(speculator)
    _answers_streams(speculator)
    if spec.top_k == 1:
        _adds_up_to_one(speculator)


def _accepts_what_is_unknown(speculator: Speculator) -> None:
    spec = speculator.spec
    experts = toy_trace(spec=spec).experts[:3].astype(np.int32)
    state = speculator.advance(speculator.initial_state(3), None, experts, None)
    known = speculator.predict(state, np.array([-1, 2**40, 7]), experts, None)
    assert np.isfinite(known).all() and (known >= 0).all() and (known <= 1).all()
    unknown = speculator.predict(state, None, experts, None)
    assert np.array_equal(known, unknown) != speculator.manifest.uses_token_ids
    np.testing.assert_allclose(known[0], unknown[0], atol=1e-6)


def _answers_streams(speculator: Speculator) -> None:
    trace, steps = toy_trace(spec=speculator.spec, seed=2), Steps(speculator)
    experts = trace.experts[:2].astype(np.int32)
    experts[:, 2:] = -1
    assert trace.gates is not None
    told = (np.array([1, -1]), experts, trace.gates[:2])
    state = speculator.initial_state(2)
    stepped = step_through(steps, state, *told, at_once=1)
    np.testing.assert_allclose(stepped, speculator.predict(state, *told), atol=1e-4)


def _adds_up_to_one(speculator: Speculator) -> None:
    trace = toy_trace((10,), spec=speculator.spec, seed=3)
    experts = np.full((1, 4, 1), -1, np.int32)
    state = speculator.initial_state(1)
    for token in range(9):
        state = speculator.advance(state, None, trace.experts[token : token + 1].astype(np.int32), None)
    sums = speculator.predict(state, None, experts, None).sum(-1)
    np.testing.assert_allclose(sums, 1.0, atol=0.35)
