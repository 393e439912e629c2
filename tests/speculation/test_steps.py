"""Step by step, by the version's own graphs or without them, comes to what predict says from scratch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from model_store.manifest import BEGIN, STEP, GraphName
from model_store.store import StoredVersion
from speculation.errors import GoldenMismatch, GraphRefused
from speculation.golden import check_golden
from speculation.runtime import Speculator
from speculation.steps import Steps, step_through
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC, toy_stored, with_graphs

TOY = toy_stored(steps=True)
SPECULATORS = {
    "graphs": Speculator(TOY, provider="cpu"),
    "no graphs": Speculator(toy_stored(), provider="cpu"),
}
either = pytest.mark.parametrize("speculator", SPECULATORS.values(), ids=SPECULATORS.keys())


def after_tokens(speculator: Speculator, seed: int, batch: int, tokens: int = 3) -> tuple[np.ndarray, ...]:
    state = speculator.initial_state(batch)
    for token in range(tokens):
        state = speculator.advance(state, *routed(seed + token, batch, TOY_SPEC, seen=TOY_SPEC.num_layers))
    return state


def with_gaps(seed: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A token of which each sequence saw layers of its own, some of them passed over."""
    token_ids, experts, gates = routed(seed, batch, TOY_SPEC, seen=TOY_SPEC.num_layers)
    experts[np.random.default_rng(seed).random(experts.shape[:2]) < 0.5] = -1
    return token_ids, experts, gates


@either
@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), at_once=st.integers(1, TOY_SPEC.num_layers))
def test_steps_come_to_what_predict_says(speculator: Speculator, seed: int, batch: int, at_once: int) -> None:
    state = after_tokens(speculator, seed, batch)
    token = with_gaps(seed + 7, batch)
    stepped = step_through(Steps(speculator), state, *token, at_once)
    np.testing.assert_allclose(stepped, speculator.predict(state, *token), atol=1e-6)


@either
def test_each_step_answers_for_the_layers_told_so_far(speculator: Speculator) -> None:
    state = after_tokens(speculator, 1, 2)
    token_ids, experts, gates = routed(5, 2, TOY_SPEC, seen=TOY_SPEC.num_layers)
    steps = Steps(speculator)
    read = [state[place] for place in steps.step_reads]
    token = steps.begin([state[place] for place in steps.begin_reads], token_ids)
    progress = steps.initial_progress(2)
    for layer in range(TOY_SPEC.num_layers):
        told = (np.full((2, 1), layer, np.int32), experts[:, [layer]], gates[:, [layer]])
        before = [array.copy() for array in progress]
        after, probabilities = steps.step(read, token, progress, *told)
        assert all(map(np.array_equal, progress, before))
        shown = experts.copy()
        shown[:, layer + 1 :] = -1
        np.testing.assert_allclose(
            probabilities, speculator.predict(state, token_ids, shown, gates), atol=1e-6
        )
        progress = after


@either
def test_a_step_that_tells_of_nothing_is_a_forecast_at_token_start(speculator: Speculator) -> None:
    state = after_tokens(speculator, 2, 3)
    token_ids, experts, gates = routed(6, 3, TOY_SPEC, seen=0)
    stepped = step_through(Steps(speculator), state, token_ids, experts, gates, at_once=1)
    np.testing.assert_allclose(stepped, speculator.predict(state, token_ids, experts, None), atol=1e-6)


@either
def test_a_batch_equals_its_rows(speculator: Speculator) -> None:
    state, token = after_tokens(speculator, 3, 5), with_gaps(8, 5)
    together = step_through(Steps(speculator), state, *token, at_once=2)
    for row in range(5):
        one = slice(row, row + 1)
        alone = step_through(Steps(speculator), [a[one] for a in state], *(a[one] for a in token), at_once=2)
        np.testing.assert_allclose(together[one], alone, atol=1e-6)


@either
def test_arrays_are_as_described(speculator: Speculator) -> None:
    steps = Steps(speculator)
    state = speculator.initial_state(2)
    token = steps.begin([state[place] for place in steps.begin_reads], np.array([3, -1]))
    for described, arrays in (
        (steps.state, state),
        (steps.token, token),
        (steps.progress, steps.initial_progress(2)),
    ):
        assert [(2, *t.shape) for t in described] == [array.shape for array in arrays]
        assert [np.dtype(t.dtype) for t in described] == [array.dtype for array in arrays]


@either
def test_advance_is_that_of_the_speculator(speculator: Speculator) -> None:
    state, token = after_tokens(speculator, 4, 2), routed(9, 2, TOY_SPEC, seen=TOY_SPEC.num_layers)
    came = Steps(speculator).advance(state, *token)
    assert all(map(np.array_equal, came, speculator.advance(state, *token)))


def test_a_graph_is_given_only_what_it_reads() -> None:
    steps = Steps(SPECULATORS["graphs"])
    assert (steps.begin_reads, steps.step_reads) == ((0, 1), ())
    assert [tensor.name for tensor in (*steps.token, *steps.progress)] == ["expected", "heard"]


def edited(name: GraphName, change: object) -> StoredVersion:
    model = onnx.load_from_string(TOY.graphs[name])
    assert callable(change)
    change(model.graph)
    return with_graphs(TOY, {name: model.SerializeToString()})


def test_steps_that_come_to_another_answer_are_refused() -> None:
    def forget(graph: onnx.GraphProto) -> None:
        (node,) = (node for node in graph.node if node.output[0] == "logits")
        node.input[0] = "heard_now"

    with pytest.raises(GoldenMismatch, match=r"toy/1 predicts, step by step, 0\.\d+ for layer 2.*promises"):
        check_golden(Speculator(edited(STEP, forget), provider="cpu"))


def renamed_output(graph: onnx.GraphProto) -> None:
    graph.node[-1].output[0] = graph.output[-1].name = "certainty"


def fixed_layers(graph: onnx.GraphProto) -> None:
    (layers,) = (tensor for tensor in graph.input if tensor.name == "layers")
    layers.type.tensor_type.shape.dim[1].dim_value = 1


def unknown_input(graph: onnx.GraphProto) -> None:
    graph.input.add().CopyFrom(helper.make_tensor_value_info("mood", TensorProto.FLOAT, ["B"]))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (BEGIN, renamed_output, r"begin\.onnx has the outputs certainty, expected expected"),
        (
            BEGIN,
            unknown_input,
            r"begin\.onnx has the inputs average, last_token, mood, token_id, expected av",
        ),
        (
            STEP,
            renamed_output,
            r"step\.onnx has the outputs certainty, next_heard, expected next_heard, prob",
        ),
        (
            STEP,
            fixed_layers,
            r"step\.onnx: input layers is tensor\(int32\) \[B, 1\], expected int32 \[B, M\]",
        ),
    ],
)
def test_another_signature_is_refused(name: GraphName, change: object, reason: str) -> None:
    with pytest.raises(GraphRefused, match=reason):
        Speculator(edited(name, change), provider="cpu")
