"""The predictors that read windows, and the ensemble: served as trained, and only the past counts."""

from typing import Any

import numpy as np
import pytest
import torch

from model_store.manifest import ADVANCE, PREDICT
from tests.training.toy_routing import SPEC, toy_trace
from tests.training.toy_zoo import ENSEMBLE, SMALL, TOP_ONE, untrained
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.calibration import Calibration, levelled
from training.predictors import examples_of, kind_of
from training.predictors.ensemble import EnsemblePredictor
from training.predictors.predictor import Predictor

NAMES = ("interlayer", "multiscale", "ensemble")
SPECS = pytest.mark.parametrize("spec", [SPEC, TOP_ONE], ids=["two routed", "one routed"])


def trace_of(spec: RoutingSpec) -> RoutingTrace:
    return toy_trace((30, 20), seed=4, spec=spec)


@torch.no_grad()
def trainable(name: str, predictor: Predictor, trace: RoutingTrace, seen: int, block_tokens: int) -> Any:
    """Logits of every token of a trace, in blocks, with its first `seen` layers known."""
    examples = examples_of(trace, block_tokens, SMALL[name])
    batch = examples.draw(np.arange(len(examples)), np.zeros(len(examples), bool))
    rows = torch.from_numpy(predictor.vocabulary.rows_of_tokens(batch.token_ids.numpy()))
    return predictor(batch, rows, torch.full((len(rows), 1), seen))[:, 0]


@torch.no_grad()
def served(name: str, predictor: Predictor, trace: RoutingTrace, token: int, seen: int) -> torch.Tensor:
    """Probabilities for a token of the first sequence after all before it."""
    spec = trace.spec
    functions = kind_of(SMALL[name]).served(predictor, Calibration(spec.num_layers, spec.top_k))
    state = {t.name: torch.zeros((1, *t.shape), dtype=getattr(torch, t.dtype)) for t in functions.state}
    assert trace.token_ids is not None and trace.gates is not None
    for number in range(token + 1):
        row = slice(number, number + 1)
        inputs = [
            torch.from_numpy(array[row].astype(kind))
            for array, kind in (
                (trace.token_ids, "int64"),
                (trace.experts, "int32"),
                (trace.gates, "float32"),
            )
        ]
        if number == token:
            inputs[1][:, seen:] = -1
            return functions.graphs[PREDICT](*[state[n] for n in functions.reads[PREDICT]], *inputs)[0]
        after = functions.graphs[ADVANCE](*[state[n] for n in functions.reads[ADVANCE]], *inputs)
        state = dict(zip(state, after, strict=True))
    raise AssertionError("no token")


@SPECS
@pytest.mark.parametrize("name", [*NAMES, "prefix"])
@pytest.mark.parametrize(("token", "seen"), [(0, 0), (0, 2), (5, 1), (7, 0), (20, 0), (20, 3)])
def test_served_functions_equal_the_trainable_form(
    name: str, spec: RoutingSpec, token: int, seen: int
) -> None:
    trace = trace_of(spec)
    predictor = untrained(SMALL[name], trace)
    came = served(name, predictor, trace, token, seen)
    # Within the first window a block tells as much as is served; later only a block of one token does.
    for block_tokens in (1, 8) if token < 8 else (1,):
        logits = trainable(name, predictor, trace, seen, block_tokens)[token]
        expected = torch.sigmoid(levelled(logits, spec.top_k))
        # Served, `prefix` keeps repeats in bytes.
        torch.testing.assert_close(
            came[seen:], expected[seen:], atol=1e-5 if name in ("interlayer", "multiscale") else 2e-3, rtol=0
        )


@pytest.mark.parametrize("name", [*NAMES, "prefix"])
@pytest.mark.parametrize("seen", [0, 2])
def test_the_future_changes_nothing_while_training(name: str, seen: int) -> None:
    trace = toy_trace((16,), seed=4)
    predictor = untrained(SMALL[name], trace)
    before = trainable(name, predictor, trace, seen, 8)
    experts = trace.experts.copy()
    experts[5, seen:] = (experts[5, seen:] + 1) % trace.spec.num_experts
    experts[6:] = (experts[6:] + 3) % trace.spec.num_experts
    other = RoutingTrace(trace.spec, experts, trace.gates, trace.token_ids, trace.starts, trace.domains)
    after = trainable(name, predictor, other, seen, 8)
    torch.testing.assert_close(after[:6], before[:6], atol=1e-6, rtol=0)
    assert not torch.allclose(after[6:], before[6:], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seen", [0, 2])
def test_the_future_changes_nothing_when_served(name: str, seen: int) -> None:
    trace = trace_of(SPEC)
    predictor = untrained(SMALL[name], trace)
    before = served(name, predictor, trace, 12, seen)
    trace.experts[12, seen:] = (trace.experts[12, seen:] + 1) % SPEC.num_experts
    trace.experts[13:] = (trace.experts[13:] + 1) % SPEC.num_experts
    assert torch.equal(served(name, predictor, trace, 12, seen), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("token", "layer"), [(12, 1), (7, 1)], ids=["this token", "an earlier token"])
def test_the_past_changes_the_forecast(name: str, token: int, layer: int) -> None:
    trace = trace_of(SPEC)
    predictor = untrained(SMALL[name], trace)
    before = served(name, predictor, trace, 12, 2)
    trace.experts[token, layer] = (trace.experts[token, layer] + 1) % SPEC.num_experts
    assert not torch.allclose(served(name, predictor, trace, 12, 2)[2:], before[2:], atol=1e-5)


@pytest.mark.parametrize("name", ["interlayer", "multiscale"])
def test_what_is_before_the_window_is_forgotten(name: str) -> None:
    trace = trace_of(SPEC)
    predictor = untrained(SMALL[name], trace)
    before = served(name, predictor, trace, 12, 2)
    trace.experts[4] = (trace.experts[4] + 1) % SPEC.num_experts  # tokens 5 to 12 are a window of 8
    assert torch.equal(served(name, predictor, trace, 12, 2), before)


def test_members_are_trained_alone_and_answer_together() -> None:
    trace = trace_of(SPEC)
    ensemble = untrained(ENSEMBLE, trace)
    assert isinstance(ensemble, EnsemblePredictor)
    ensemble.weights.copy_(torch.tensor([0.5, 0.3, 0.2]))
    joint = examples_of(trace, 8, ENSEMBLE)
    batch = joint.draw(np.arange(2), np.zeros(2, bool))
    rows = torch.from_numpy(ensemble.vocabulary.rows_of_tokens(batch.token_ids.numpy()))
    seen = torch.zeros((len(rows), 1), dtype=torch.int64)
    each = ensemble.each(batch, rows, seen)
    for logits, (name, member) in zip(each, ensemble.members.items(), strict=True):
        torch.testing.assert_close(logits, member(getattr(batch, name), rows, seen))
    torch.testing.assert_close(ensemble(batch, rows, seen), 0.5 * each[0] + 0.3 * each[1] + 0.2 * each[2])
    assert ensemble.train()(batch, rows, seen).shape == each.shape


def test_a_better_member_counts_more() -> None:
    trace = trace_of(SPEC)
    ensemble = untrained(ENSEMBLE, trace)
    assert isinstance(ensemble, EnsemblePredictor)
    with torch.no_grad():
        ensemble.members["interlayer"].head.weight.mul_(10)
    ensemble.settle(examples_of(trace, 1, ENSEMBLE))
    weights = ensemble.settled()["weights"]
    assert sum(weights.values()) == pytest.approx(1, abs=1e-3)
    assert weights["interlayer"] < min(weights["prefix"], weights["multiscale"])
