"""The prefix predictor: its two exported functions say what its trainable form says, and know no future."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from model_store.manifest import ADVANCE, BEGIN, PREDICT, STEP, GraphName
from tests.training.toy_run import PREDICTOR, TRAIN
from traces.spec import RoutingSpec
from training.calibration import Calibration
from training.config import PrefixConfig
from training.dataset import Blocks
from training.errors import ConfigInvalid
from training.export import TOLD, example_inputs, output_names
from training.loss import NEAREST
from training.onnx_graph import halve, to_onnx
from training.predictors.prefix import PrefixPredictor, ahead
from training.predictors.prefix_graphs import served as graphs_of
from training.quantization import quantized
from training.vocabulary import Vocabulary


@pytest.fixture(scope="module", params=[True, False], ids=["token ids", "no token ids"])
def predictor(request: pytest.FixtureRequest) -> PrefixPredictor:
    """Untrained, but with every part of it at work."""
    torch.manual_seed(3)
    vocabulary = Vocabulary.of(TRAIN.token_ids if request.param else None, TRAIN.starts)
    network = PrefixPredictor(TRAIN.spec, PREDICTOR, vocabulary).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        network.tokens.weight[0] = 0.0
    assert network.reads_ids == request.param == bool(len(network.vocabulary.pairs))
    return network


def test_of_the_next_layers_it_says_the_same_with_every_prefix_at_once(predictor: PrefixPredictor) -> None:
    batch = next(Blocks(TRAIN, 4, PREDICTOR).in_order(40))
    rows = torch.from_numpy(predictor.vocabulary.rows_of_tokens(batch.token_ids.numpy()))
    layers = predictor.spec.num_layers
    every, some = torch.arange(layers).expand(len(rows), -1), torch.tensor([[2, 0]]).expand(len(rows), -1)
    with torch.no_grad():
        logits, of_next = predictor.with_next(batch, rows, some)
        expected = predictor(batch, rows, every)
    torch.testing.assert_close(logits, expected[:, [2, 0]], atol=1e-4, rtol=1e-4)
    assert of_next.shape[1] == min(NEAREST, layers)
    for early in range(of_next.shape[1]):
        came = of_next[:, early, early:].mT
        torch.testing.assert_close(came, expected.diagonal(early, 1, 2), atol=1e-4, rtol=1e-4)


def served(predictor: PrefixPredictor, experts: np.ndarray, seen: int) -> torch.Tensor:
    """Probabilities for the last of these tokens of a sequence, its first `seen` layers known."""
    functions = graphs_of(predictor, Calibration(predictor.spec.num_layers, predictor.spec.top_k))
    state = {t.name: torch.zeros((1, *t.shape), dtype=getattr(torch, t.dtype)) for t in functions.state}
    assert TRAIN.token_ids is not None and TRAIN.gates is not None
    with torch.no_grad():
        for token in range(len(experts)):
            row = slice(token, token + 1)
            ids = torch.from_numpy(TRAIN.token_ids[row].astype(np.int64))
            gates, routed = (
                torch.from_numpy(TRAIN.gates[row]),
                torch.from_numpy(experts[row].astype(np.int32)),
            )
            if token == len(experts) - 1:
                routed[:, seen:] = -1
                read = [state[name] for name in functions.reads[PREDICT]]
                return functions.graphs[PREDICT](*read, ids, routed, gates)[0]
            read = [state[name] for name in functions.reads[ADVANCE]]
            state = dict(zip(state, functions.graphs[ADVANCE](*read, ids, routed, gates), strict=True))
    raise AssertionError("no token")


@pytest.mark.parametrize("reach", [1, 3, 5])
def test_what_a_layer_says_goes_to_the_layers_after_it(reach: int) -> None:
    spec = RoutingSpec("m", num_layers=5, num_experts=3, top_k=1)
    near = torch.randn(2, spec.num_layers, reach * spec.num_experts)
    expected = torch.zeros(2, spec.num_layers, spec.num_layers, spec.num_experts)
    for layer, distance in np.ndindex(spec.num_layers, reach):
        if layer + 1 + distance < spec.num_layers:
            said = near.unflatten(-1, (reach, spec.num_experts))[:, layer, distance]
            expected[:, layer, layer + 1 + distance] = said
    torch.testing.assert_close(ahead(near, spec), expected.flatten(2))


def test_a_sum_that_fades_beyond_floats_is_refused() -> None:
    spec = RoutingSpec("deep", 200, 8, 2)
    with pytest.raises(ConfigInvalid, match=r"layer_decay is 0\.1, too small for floats with 200 layers"):
        PrefixPredictor(spec, replace(PREDICTOR, layer_decay=0.1), Vocabulary.of(None, TRAIN.starts))


@pytest.mark.parametrize("seen", [0, 1, 3])
@pytest.mark.parametrize("token", [0, 1, 20, 31])
def test_served_functions_equal_the_trainable_form(predictor: PrefixPredictor, token: int, seen: int) -> None:
    blocks = Blocks(TRAIN, 32, PREDICTOR)
    batch = next(blocks.in_order(32))
    rows = torch.from_numpy(predictor.vocabulary.rows_of_tokens(batch.token_ids.numpy()))
    with torch.no_grad():
        logits = predictor(batch, rows, torch.full((len(rows), 1), seen))[token, 0]
    came = served(predictor, TRAIN.experts[: token + 1], seen)
    # Served, repeats are kept in bytes.
    torch.testing.assert_close(came[seen:], torch.sigmoid(logits)[seen:], atol=2e-3, rtol=0)


def test_with_many_layers_steps_still_come_to_what_predict_says() -> None:
    spec = RoutingSpec("deep", num_layers=60, num_experts=8, top_k=2)
    torch.manual_seed(0)
    network = PrefixPredictor(spec, PREDICTOR, Vocabulary.of(None, TRAIN.starts)).eval()
    with torch.no_grad():
        for embedding in (network.routing, network.fading):
            embedding.weight.normal_(std=0.5)
    functions = graphs_of(network, Calibration(spec.num_layers, spec.top_k))
    rng = np.random.default_rng(0)
    experts = torch.from_numpy(np.argsort(rng.random((1, 60, 8)))[..., :2].astype(np.int32))
    gates = torch.from_numpy(rng.random((1, 60, 2), np.float32))
    state = {t.name: torch.zeros((1, *t.shape), dtype=getattr(torch, t.dtype)) for t in functions.state}
    told, step = ([state[name] for name in functions.reads[graph]] for graph in (PREDICT, STEP))
    with torch.no_grad():
        token = functions.graphs[BEGIN](*[state[name] for name in functions.reads[BEGIN]], torch.tensor([-1]))
        progress = [torch.zeros((1, *t.shape), dtype=getattr(torch, t.dtype)) for t in functions.progress]
        for layer in range(59):
            part = np.s_[:, layer : layer + 1]
            number = torch.full((1, 1), layer, dtype=torch.int32)
            *progress, came = functions.graphs[STEP](
                *step, *token, *progress, number, experts[part], gates[part]
            )
            shown = experts.clone()
            shown[:, layer + 1 :] = -1
            expected = functions.graphs[PREDICT](*told, torch.tensor([-1]), shown, gates)
            ahead_of_it = np.s_[:, layer + 1 :]
            torch.testing.assert_close(came[ahead_of_it], expected[ahead_of_it], atol=2e-3, rtol=0)


def test_the_future_changes_nothing(predictor: PrefixPredictor) -> None:
    experts = TRAIN.experts[:10].copy()
    before = served(predictor, experts, 2)
    experts[9, 2:] = (experts[9, 2:] + 1) % TRAIN.spec.num_experts
    assert torch.equal(served(predictor, experts, 2), before)


@pytest.mark.parametrize("token", [9, 4], ids=["this token", "an earlier token"])
def test_the_past_changes_the_prediction(predictor: PrefixPredictor, token: int) -> None:
    experts = TRAIN.experts[:10].copy()
    before = served(predictor, experts, 2)
    experts[token, 1] = (experts[token, 1] + 1) % TRAIN.spec.num_experts
    assert not torch.allclose(served(predictor, experts, 2)[2:], before[2:], atol=1e-5)


def test_predict_and_step_have_the_same_8_bits() -> None:
    # Of a real size: the exporter works out small tables itself.
    spec = RoutingSpec("m", num_layers=24, num_experts=32, top_k=4)
    network = PrefixPredictor(spec, PrefixConfig(), Vocabulary.of(None, TRAIN.starts)).eval()
    halve(network)
    functions = graphs_of(network, Calibration(spec.num_layers, spec.top_k))
    numbers: dict[GraphName, list[np.ndarray[Any, Any]]] = {}
    for name in (PREDICT, STEP):
        inputs = example_inputs(spec, functions, name)
        told = TOLD if name == STEP else ()
        graph = to_onnx(functions.graphs[name], inputs, output_names(functions, name), told=told)
        weights = onnx.load_from_string(quantized(graph)).graph.initializer
        numbers[name] = [onnx.numpy_helper.to_array(weight) for weight in weights]
    for size in (network.routing.weight.numel(), network.fading.weight.numel()):
        multiplied = [n.astype(int) - 128 for n in numbers[PREDICT] if n.dtype == np.uint8 and n.size == size]
        looked_up = [n for n in numbers[STEP] if n.dtype == np.int8 and n.size == size]
        assert any(
            np.array_equal(ours.ravel(), theirs.ravel()) for ours in looked_up for theirs in multiplied
        )
