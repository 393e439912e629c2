"""Graphs that are not what their manifest says: refused before they answer, with what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from model_store.manifest import ADVANCE, PREDICT, GraphName, StateTensor
from model_store.store import StoredVersion
from speculation.errors import GraphRefused
from speculation.runtime import Speculator
from tests.toy_version import toy_stored, with_graphs
from traces.spec import RoutingSpec

TOY = toy_stored()


def edited(stored: StoredVersion, name: GraphName, edit: Callable[[onnx.GraphProto], None]) -> StoredVersion:
    model = onnx.load_from_string(stored.graphs[name])
    edit(model.graph)
    return with_graphs(stored, {name: model.SerializeToString()})


def refused(stored: StoredVersion, reason: str) -> None:
    with pytest.raises(GraphRefused, match=reason):
        Speculator(stored, provider="cpu")


@pytest.mark.parametrize("name", [PREDICT, ADVANCE])
@pytest.mark.parametrize(
    "damage",
    [
        lambda graph: b"",
        lambda graph: b"no graph",
        lambda graph: graph[: len(graph) // 2],
        lambda graph: graph[::-1],
    ],
    ids=["empty", "text", "cut", "reversed"],
)
def test_bytes_that_are_no_graph_are_refused(name, damage, capfd):
    refused(
        with_graphs(TOY, {name: damage(TOY.graphs[name])}),
        rf"^toy/1/{name} is no graph that ONNX Runtime",
    )
    assert capfd.readouterr().err == ""


def test_an_operator_nobody_knows_is_refused():
    def unknown(graph):
        graph.node[0].op_type = "Guess"

    refused(
        edited(TOY, PREDICT, unknown),
        "is no graph that ONNX Runtime .* can run: .*Guess",
    )


def test_weights_outside_the_file_are_refused(tmp_path, monkeypatch):
    """What is loaded must be what was checked: the checksum covers the graph's own bytes only."""

    def outside(graph):
        (weights,) = (tensor for tensor in graph.initializer if tensor.name == "frequencies")
        (tmp_path / "weights").write_bytes(weights.raw_data)
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value="weights")

    monkeypatch.chdir(tmp_path)
    refused(edited(TOY, PREDICT, outside), "can run: .*[Ee]xternal data")


def dimension(graph, index: int, axis: int, size: int | None) -> None:
    axes = graph.input[index].type.tensor_type.shape.dim
    axes[axis].Clear()
    if size is not None:
        axes[axis].dim_value = size


def renamed_output(graph):
    graph.node[-1].output[0] = graph.output[0].name = "logits_too"


def dropped_input(graph):
    graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("mood", TensorProto.FLOAT, ["B"]))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (renamed_output, "has the outputs logits_too, expected probabilities"),
        (
            dropped_input,
            "has the inputs average, experts, gates, last_token, mood, token_id, expected average, ",
        ),
        (
            lambda graph: dimension(graph, 2, 0, 1),
            r"input token_id is tensor\(int64\) \[1\], expected int64 \[B\]",
        ),
    ],
    ids=["output", "input", "batch"],
)
def test_another_signature_is_refused(edit, reason):
    refused(edited(TOY, PREDICT, edit), rf"toy/1/predict\.onnx.*{reason}")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            RoutingSpec("toy", 5, 8, 2),
            r"input experts is tensor\(int32\) [B, 4, 2], expected int32 [B, 5, 2]",
        ),
        (
            RoutingSpec("toy", 4, 8, 3),
            r"input experts is tensor\(int32\) [B, 4, 2], expected int32 [B, 4, 3]",
        ),
        (
            RoutingSpec("toy", 4, 9, 2),
            r"output probabilities is tensor\(float\) [B, 4, 8], expected float32 [B, 4, 9]",
        ),
    ],
    ids=["layers", "top-k", "experts"],
)
def test_a_graph_of_another_spec_is_refused(spec, reason):
    manifest = TOY.manifest.model_copy(update={"spec": spec})
    refused(replace(TOY, manifest=manifest), reason.replace("[", r"\[").replace("]", r"\]"))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            (),
            "has the inputs average, experts, gates, last_token, token_id, expected experts, gates, token_id",
        ),
        (
            (("average", "float32", (4, 9)), ("last_token", "int32", (1,))),
            "input average is tensor(float) [B, 4, 8], expected float32 [B, 4, 9]",
        ),
        (
            (("average", "int32", (4, 8)), ("last_token", "int32", (1,))),
            "input average is tensor(float) [B, 4, 8], expected int32 [B, 4, 8]",
        ),
        (
            (("average", "float32", (4, 8)), ("last_token", "int32", ())),
            "input last_token is tensor(int32) [B, 1], expected int32 [B]",
        ),
    ],
    ids=["none", "shape", "dtype", "rank"],
)
def test_another_state_is_refused(state, reason):
    tensors = tuple(StateTensor(name=name, dtype=dtype, shape=shape) for name, dtype, shape in state)
    manifest = TOY.manifest.model_copy(update={"state": tensors})
    refused(replace(TOY, manifest=manifest), re.escape(reason))


def test_advance_must_return_the_next_state():
    def renamed(graph):
        graph.node[-1].output[0] = graph.output[1].name = "last_token_next"

    refused(
        edited(TOY, ADVANCE, renamed),
        r"toy/1/advance\.onnx has the outputs last_token_next, next_average, expected next_average, ",
    )


def test_swapped_graphs_are_refused():
    refused(
        with_graphs(TOY, {PREDICT: TOY.graphs[ADVANCE], ADVANCE: TOY.graphs[PREDICT]}),
        "predict.onnx has the outputs next_average",
    )


def test_a_symbolic_dimension_fits_whatever_comes():
    relaxed = edited(TOY, PREDICT, lambda graph: dimension(graph, 3, 1, None))
    state = Speculator(TOY, provider="cpu").initial_state(1)
    unseen = np.full((1, 4, 2), -1, np.int32)
    answer = Speculator(relaxed, provider="cpu").predict(state, None, unseen, None)
    assert answer.shape == (1, 4, 8)
