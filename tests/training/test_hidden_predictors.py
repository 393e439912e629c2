"""Predictors that read hidden states: what they are drawn, trained, served, and what they do without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specmoe.cli import main
from speculation.golden import check_golden
from speculation.runtime import Speculator, load_speculator
from speculation.sequence import Sequence
from speculation.steps import Steps, step_through
from tests.training.toy_hidden import SIZE, save_shards, toy_hidden_trace, with_hidden
from tests.training.toy_models import saved
from tests.training.toy_routing import SPEC, toy_trace
from tests.training.toy_run import save_npz
from tests.training.toy_zoo import SMALL, TOP_ONE, TRAINING, published, untrained
from traces.files import load
from traces.trace import RoutingTrace
from training.augmentation import Change
from training.calibration import Calibration
from training.errors import ConfigInvalid, HiddenMissing
from training.evaluate import evaluate, score_version
from training.hidden_states import HiddenBatch, HiddenExamples, check_hidden
from training.optimizer import optimizer
from training.predictor_configs import HiddenMLPConfig
from training.predictors import examples_of, kind_of
from training.report import markdown

TRACE = toy_hidden_trace((9, 1, 14))
assert TRACE.hidden is not None
HIDDEN = TRACE.hidden
NAMES = ("next-gate", "hidden-linear", "hidden-mlp", "prefix-hidden")
BLOCK = 4


def drawn(examples: Any, blocks: list[int]) -> Any:
    return examples.draw(np.array(blocks), np.zeros(len(blocks), bool))


def test_a_batch_has_for_each_prefix_what_the_last_router_was_given() -> None:
    batch = drawn(HiddenExamples(TRACE, BLOCK, None), [1, 2, 3])
    tokens = [4, 5, 6, 7, 8, 9]
    expected = HIDDEN.newest(TRACE.starts, np.array(tokens)[:, None], np.arange(SPEC.num_layers + 1))
    assert np.array_equal(batch.newest.numpy(), expected)
    seen = torch.tensor([[0, 3]]).expand(len(tokens), -1)
    assert np.array_equal(batch.at(seen).numpy(), expected[:, [0, 3]])
    assert np.array_equal(batch.targets.sum(1).numpy(), _counts(TRACE.experts[tokens]))


def _counts(experts: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(token.ravel(), minlength=SPEC.num_experts) for token in experts])


def test_what_is_hidden_or_dropped_is_not_told() -> None:
    batch: HiddenBatch = drawn(HiddenExamples(TRACE, BLOCK, None), [1])
    nobody, first = torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, False, False])
    without = batch.hiding(first, nobody)
    assert not without.newest[0, 0].any() and torch.equal(without.newest[0, 1:], batch.newest[0, 1:])
    assert torch.equal(without.newest[1:], batch.newest[1:]) and batch.newest[0, 0].any()
    dropped = torch.zeros(4, SPEC.num_layers, dtype=torch.bool)
    dropped[2, 1] = True
    as_they_are = torch.arange(SPEC.num_experts).expand(4, SPEC.num_layers, -1)
    change = Change(as_they_are, first, dropped, torch.arange(4), torch.ones(4), 0.0)
    changed = batch.changed(change).newest
    assert not changed[0].any() and not changed[2, 2].any()
    changed[2, 2] = batch.newest[2, 2].float()
    assert torch.equal(changed[1:], batch.newest[1:].float())
    assert not drawn(HiddenExamples(TRACE, BLOCK, None).untold(), [1]).newest.any()


def served_last(name: str, trace: RoutingTrace, seen: int, told: bool) -> tuple[np.ndarray, np.ndarray]:
    """(trained form, served form) of the last token's probabilities, before it is exported."""
    assert trace.hidden is not None and trace.token_ids is not None and trace.gates is not None
    predictor = untrained(SMALL[name], trace)
    predictor.prepare(examples_of(trace, BLOCK, SMALL[name]))
    calibration = Calibration(SPEC.num_layers, SPEC.top_k, hidden=True)
    examples = examples_of(trace, BLOCK, SMALL[name])
    batch = drawn(examples if told else examples.untold(), [len(examples) - 1])
    rows = torch.from_numpy(predictor.vocabulary.rows_of_tokens(batch.token_ids.numpy()))
    functions = kind_of(SMALL[name]).served(predictor, calibration)
    with torch.no_grad():
        logits = predictor(batch, rows, torch.full((len(rows), 1), seen))[-1, 0]
        state = {t.name: torch.zeros((1, *t.shape), dtype=getattr(torch, t.dtype)) for t in functions.state}
        for token in range(int(trace.starts[-2]), trace.num_tokens):
            ids = torch.tensor([int(trace.token_ids[token])])
            experts = torch.from_numpy(trace.experts[token : token + 1].astype(np.int32))
            gates = torch.from_numpy(trace.gates[token : token + 1])
            if token < trace.num_tokens - 1:
                read = [state[read] for read in functions.reads["advance.onnx"]]
                after = functions.graphs["advance.onnx"](*read, ids, experts, gates)
                state = dict(zip(state, after, strict=True))
        experts[:, seen:] = -1
        newest = trace.hidden.newest(trace.starts, np.array([trace.num_tokens - 1]), seen).astype(np.float32)
        hidden = torch.from_numpy(newest) * told
        read = [state[read] for read in functions.reads["predict.onnx"]]
        answer = functions.graphs["predict.onnx"](*read, ids, experts, gates, hidden)[0]
    return torch.sigmoid(logits).numpy()[seen:], answer.numpy()[seen:]


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("seen", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_served_is_what_was_trained(name: str, seen: int, told: bool) -> None:
    trained, served = served_last(name, TRACE, seen, told)
    np.testing.assert_allclose(served, trained, atol=3e-3 if name == "prefix-hidden" else 1e-5)


def test_the_next_gate_is_the_models_own() -> None:
    batch = drawn(HiddenExamples(TRACE, BLOCK, None), [0, 1])
    predictor = untrained(SMALL["next-gate"], TRACE)
    predictor.prepare(HiddenExamples(TRACE, BLOCK, None))
    assert HIDDEN.routers is not None
    seen = torch.full((8, 1), 2)
    logits = predictor(batch, torch.zeros(8, 2, dtype=torch.int64), seen)[:, 0].detach().numpy()
    own = np.einsum("nh,leh->nle", HIDDEN.states[:8, 1].astype(np.float32), HIDDEN.routers[..., :-1])
    assert np.array_equal(logits.argsort(-1), own.argsort(-1))


def test_the_models_own_routers_do_not_decay_in_training() -> None:
    predictor = untrained(SMALL["next-gate"], TRACE)
    predictor.prepare(HiddenExamples(TRACE, BLOCK, None))
    before = {name: value.clone() for name, value in predictor.state_dict().items()}
    steps = optimizer(predictor, TRAINING)
    for parameter in predictor.parameters():  # as several processes do, for what none of them has one for
        parameter.grad = torch.zeros_like(parameter)
    steps.step()
    after = predictor.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["usual"]


# One fixture each, and several looks at it: exporting takes seconds.
@pytest.fixture(scope="module", params=[*NAMES, "top one"])
def speculator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Speculator:
    folder = tmp_path_factory.mktemp("hidden")
    if request.param == "top one":
        return published("hidden-linear", SMALL["hidden-linear"], folder, TOP_ONE)
    how = replace(TRAINING, permute_experts=0.1, drop_layers=0.1, mixup=0.3, noise=0.1)
    return published(
        request.param, SMALL[request.param], folder, SPEC, how if request.param == "hidden-mlp" else TRAINING
    )


def test_a_published_one_forecasts_better_when_told_and_all_the_same_without(speculator: Speculator) -> None:
    name, spec = speculator.manifest.predictor.name, speculator.spec
    assert name in NAMES and speculator.manifest.hidden_size == SIZE
    result = evaluate(speculator, with_hidden(toy_trace((80, 60), seed=9, spec=spec)), every=2)
    told, untold = result.metrics.distances()["1"], result.withheld["hidden"].distances()["1"]
    gained = told["recall_at_k"] - untold["recall_at_k"]
    # A trunk of 16 numbers that reads routing as well has little room for the state.
    assert gained > (0.005 if name == "prefix-hidden" else 0.1)
    assert told["ece"] < 0.25 and untold["recall_at_k"] > 1.05 * spec.top_k / spec.num_experts
    document = result.document()
    assert document["trace"]["hidden"]
    document["trace"] |= {"name": "test", "sha256": "0" * 64}
    assert "## Without hidden states" in markdown(document, {})
    bare = score_version(speculator, replace(result.trace, hidden=None), every=2 * 4).distances()
    assert bare == result.withheld["hidden"].distances()


def test_a_published_one_goes_without_and_step_by_step(speculator: Speculator) -> None:
    check_golden(speculator)
    trace = toy_trace(spec=speculator.spec, seed=2)
    assert trace.gates is not None
    experts = trace.experts[:2].astype(np.int32)
    experts[:, 2:] = -1
    told = (np.array([1, -1]), experts, trace.gates[:2])
    state = speculator.initial_state(2)
    without = speculator.predict(state, *told)
    np.testing.assert_allclose(step_through(Steps(speculator), state, *told, at_once=1), without, atol=1e-4)
    hidden = np.random.default_rng(0).normal(size=(2, SIZE)).astype(np.float32)
    assert np.abs(speculator.predict(state, *told, hidden) - without).max() > 1e-3


def test_traces_without_hidden_states_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, bare = save_shards(TRACE, tmp_path / "train"), save_npz(toy_trace(seed=3), tmp_path / "bare.npz")
    command = ["train", "--predictor", "hidden-linear", "--run", str(tmp_path / "run")]
    for traces, validation in ((bare, train), (train, bare)):
        assert main([*command, "--traces", str(traces), "--validation", str(validation)]) == 2
        assert "have no hidden states, and this predictor reads them. Record" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_hidden_states_of_another_size_are_refused() -> None:
    wider = replace(HIDDEN, states=np.concatenate([HIDDEN.states, HIDDEN.states], -1))
    with pytest.raises(HiddenMissing, match="have 48 numbers, expected 24"):
        check_hidden(TRACE, replace(TRACE, hidden=wider))


def test_without_routers_there_is_no_next_gate() -> None:
    trace = with_hidden(toy_trace((9,)), routers=False)
    predictor = untrained(SMALL["next-gate"], trace)
    with pytest.raises(HiddenMissing, match="come without their routers' weights"):
        predictor.prepare(examples_of(trace, BLOCK, SMALL["next-gate"]))


def test_from_a_model_to_a_sequence_that_is_told_its_hidden_states(tmp_path: Path) -> None:
    """Recorded from a real mixture-of-experts model, trained, published, and followed layer by layer."""
    model = saved(tmp_path / "model")
    for use, text in (("train", "The sea is wide, and the land is far. "), ("validation", "A far land. ")):
        (tmp_path / f"{use}.txt").write_text(text * 12, encoding="utf-8")
        given = ["--text", str(tmp_path / f"{use}.txt"), "--out", str(tmp_path / use), "--length", "64"]
        assert main(["collect", str(model), *given, "--hidden", "--device", "cpu", "--name", "toy"]) == 0
    splits = ["--traces", str(tmp_path / "train"), "--validation", str(tmp_path / "validation")]
    where = ["--run", str(tmp_path / "run"), "--publish", "--store", str(tmp_path / "store")]
    size = ["--batch-tokens", "32", "--width", "16", "--hidden", "32", "--passes", "6", "--averaging", "0.5"]
    assert main(["train", "--predictor", "hidden-mlp", *splits, *where, *size]) == 0

    speculator = load_speculator("toy", store=tmp_path / "store", provider="cpu")
    trace = load(tmp_path / "validation", hidden=True)
    assert trace.hidden is not None and speculator.manifest.hidden_size == trace.hidden.size == 32
    sequence = Sequence(speculator)
    sequence.start_token()
    sequence.observe(trace.experts[0, 0], None, trace.hidden.states[0, 0])
    (nearest, *_) = sequence.forecast(top_n=2)
    experts = trace.experts[:1].astype(np.int32)
    experts[:, 1:] = -1
    state, hidden = speculator.initial_state(1), trace.hidden.states[:1, 0].astype(np.float32)
    expected = speculator.predict(state, None, experts, None, hidden)[0, 1]
    assert nearest.experts.tolist() == np.argsort(-expected, kind="stable")[:2].tolist()


def test_a_config_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"drop_hidden is 1\.0, expected 0 or more and below 1"):
        HiddenMLPConfig(drop_hidden=1.0)
