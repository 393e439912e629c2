"""A tiny but real version: two ONNX graphs that follow the contract, and a folder store that holds them.

Its probabilities depend on everything a predictor may depend on: state (an average of past routing, the last
token id), the current token id, and the layers seen so far, weighted by gate.

    draft, graphs = toy_version()               # steps=True: with begin and step; outlook=True: with that
    store = open_store(toy_store(tmp_path))     # "toy": versions 1 and 2, production = 2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model_store.documents import complete
from model_store.manifest import (
    ADVANCE,
    BEGIN,
    OUTLOOK,
    PREDICT,
    STEP,
    Coverage,
    Draft,
    GraphName,
    Lineage,
    Outlook,
    Predictor,
    StateTensor,
    TraceSource,
)
from model_store.store import StoredVersion, open_store
from speculation.golden import golden_probabilities, golden_uses
from speculation.runtime import Speculator
from traces.spec import RoutingSpec

TOY_SPEC = RoutingSpec(model="toy", num_layers=4, num_experts=8, top_k=2)
OPSET = 20
# The newest format that the oldest supported ONNX Runtime reads.
IR_VERSION = 10
LEVELS = (0.9, 0.95, 0.99)
# Some of what it forecasts is above, so that sets differ in size.
THRESHOLDS = (0.5, 0.4, 0.3)


def toy_version(
    spec: RoutingSpec = TOY_SPEC,
    *,
    bias: float = -1.0,
    steps: bool = False,
    outlook: bool = False,
    hidden_size: int = 0,
    **overrides: Any,
) -> tuple[Draft, dict[GraphName, bytes]]:
    """(draft, graphs). bias: added to the logits; steps: with begin, step; outlook: with that graph.

    hidden_size: of the hidden states it reads, whose mean it adds to the logits. overrides: fields of the
    draft.
    """
    graphs: dict[GraphName, bytes] = {
        PREDICT: _predict_graph(spec, bias, hidden_size),
        ADVANCE: _advance_graph(spec),
    }
    fields = _fields(spec) | {"hidden_size": hidden_size}
    if steps:
        graphs |= {BEGIN: _begin_graph(spec, bias), STEP: _step_graph(spec)}
        per_expert = (spec.num_layers, spec.num_experts)
        fields["token"] = (StateTensor(name="expected", dtype="float32", shape=per_expert),)
        fields["progress"] = (StateTensor(name="heard", dtype="float32", shape=per_expert),)
    if outlook:
        graphs[OUTLOOK] = _outlook_graph(spec)
        fields["outlook"] = Outlook(
            tokens=3,
            golden=fields["golden"],
            metrics={"validation": {"ece": 0.01}},
            lineage=fields["lineage"],
        )
    draft = Draft(**(fields | overrides))
    if "golden" not in overrides:
        unchecked = StoredVersion(complete(draft, 1, graphs), graphs)
        speculator = Speculator(unchecked, provider="cpu")
        draft = draft.model_copy(update={"golden": _rows(golden_probabilities(speculator))})
        if draft.outlook is not None:
            told = draft.outlook.model_copy(update={"golden": _rows(golden_uses(speculator))})
            draft = draft.model_copy(update={"outlook": told})
    return draft, graphs


def toy_stored(spec: RoutingSpec = TOY_SPEC, **options: Any) -> StoredVersion:
    """The toy as if it had been loaded from a store. options: of `toy_version`."""
    draft, graphs = toy_version(spec, **options)
    return StoredVersion(complete(draft, 1, graphs), graphs)


def with_graphs(stored: StoredVersion, graphs: Mapping[GraphName, bytes]) -> StoredVersion:
    """The same with other graphs."""
    return replace(stored, graphs={**stored.graphs, **graphs})


def toy_store(folder: Path) -> Path:
    """A folder store with "toy" versions 1 and 2, which predict differently; production = 2."""
    root = folder / "store"
    store = open_store(root)
    store.publish(*toy_version(bias=-1.0))
    store.publish(*toy_version(bias=-0.5), aliases=["production"])
    return root


def _rows(golden: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in golden)


def _fields(spec: RoutingSpec) -> dict[str, Any]:
    layers, experts = spec.num_layers, spec.num_experts
    table = tuple(
        tuple(min(experts, spec.top_k + distance) for distance in range(1, layer + 2))
        for layer in range(layers)
    )
    return {
        "spec": spec,
        "predictor": Predictor(name="toy", parameters=0),
        "uses_token_ids": True,
        "uses_gates": True,
        "state": (
            StateTensor(name="average", dtype="float32", shape=(layers, experts)),
            StateTensor(name="last_token", dtype="int32", shape=(1,)),
        ),
        "opset": OPSET,
        "metrics": {"validation": {"start": {"recall_at_k": 0.5}, "1": {"recall_at_k": 0.6}}},
        "coverage": Coverage(
            levels=LEVELS,
            experts=tuple(
                tuple(tuple(min(experts, n + extra) for n in row) for row in table)
                for extra in range(len(LEVELS))
            ),
            thresholds=tuple(
                tuple((threshold,) * (layer + 1) for layer in range(layers)) for threshold in THRESHOLDS
            ),
        ),
        "golden": ((0.0,) * experts,) * layers,
        "lineage": Lineage(
            traces=(TraceSource(name="made-up", use="train", sha256="0" * 64, tokens=100, sequences=2),),
            command="toy",
            code_revision="none",
            seed=0,
            trained_seconds=0.0,
            hardware="none",
            packages={"onnx": onnx.__version__},
        ),
    }


def _state(spec: RoutingSpec) -> list[onnx.ValueInfoProto]:
    return [_per_expert("average", spec), _value("last_token", TensorProto.INT32, ["B", 1])]


def _token_id() -> onnx.ValueInfoProto:
    return _value("token_id", TensorProto.INT64, ["B"])


def _routing(spec: RoutingSpec, layers: int | str) -> list[onnx.ValueInfoProto]:
    return [
        _value("experts", TensorProto.INT32, ["B", layers, spec.top_k]),
        _value("gates", TensorProto.FLOAT, ["B", layers, spec.top_k]),
    ]


def _per_expert(name: str, spec: RoutingSpec) -> onnx.ValueInfoProto:
    return _value(name, TensorProto.FLOAT, ["B", spec.num_layers, spec.num_experts])


_value = helper.make_tensor_value_info


def _constants(spec: RoutingSpec) -> dict[str, np.ndarray]:
    layers, experts = spec.num_layers, spec.num_experts
    return {
        "zero": np.array(0, np.float32),
        "none": np.array(0, np.int32),
        "half": np.array(0.5, np.float32),
        "tiny": np.array(1e-9, np.float32),
        "depth": np.array(experts, np.int64),
        "layer_depth": np.array(layers, np.int64),
        "off_on": np.array([0, 1], np.float32),
        "slots": np.array([2], np.int64),
        "last": np.array([-1], np.int64),
        "middle": np.array([1], np.int64),
        # Each layer hears of all earlier ones, the nearest loudest.
        "earlier": np.tril(0.5 ** (np.arange(layers)[:, None] - np.arange(layers)[None, :]), -1).astype(
            np.float32
        )
        * 4,
        "frequencies": (np.arange(1, layers * experts + 1, dtype=np.float32) / 3).reshape(layers, experts),
    }


def _used() -> list[onnx.NodeProto]:
    """experts, gates -> used [B, L, E]: the share of the gate each expert got; 0 in layers not seen."""
    node = helper.make_node
    return [
        node("GreaterOrEqual", ["experts", "none"], ["seen"]),
        node("Where", ["seen", "gates", "zero"], ["weights"]),
        node("ReduceSum", ["weights", "slots"], ["sums"], keepdims=1),
        node("Max", ["sums", "tiny"], ["positive_sums"]),
        node("Div", ["weights", "positive_sums"], ["shares"]),
        # An id of -1 counts from the end here; its share is 0.
        node("Cast", ["experts"], ["ids"], to=TensorProto.INT64),
        node("OneHot", ["ids", "depth", "off_on"], ["slot_onehot"], axis=-1),
        node("Unsqueeze", ["shares", "last"], ["slot_shares"]),
        node("Mul", ["slot_onehot", "slot_shares"], ["slot_used"]),
        node("ReduceSum", ["slot_used", "slots"], ["used"], keepdims=0),
    ]


def _expected() -> list[onnx.NodeProto]:
    """average, last_token, token_id -> expected [B, L, E]: logits with no layer seen."""
    node = helper.make_node
    return [
        node("Cast", ["last_token"], ["last_token_float"], to=TensorProto.FLOAT),
        node("Cast", ["token_id"], ["token_float"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["token_float", "middle"], ["token_column"]),
        node("Mul", ["last_token_float", "half"], ["faded"]),
        node("Add", ["token_column", "faded"], ["tokens"]),
        node("Unsqueeze", ["tokens", "last"], ["tokens_wide"]),
        node("Mul", ["tokens_wide", "frequencies"], ["angles"]),
        node("Sin", ["angles"], ["waves"]),
        node("Add", ["average", "waves"], ["sum"]),
        node("Add", ["sum", "bias"], ["expected"]),
    ]


def _predict_graph(spec: RoutingSpec, bias: float, hidden_size: int) -> bytes:
    node = helper.make_node
    nodes = [
        *_used(),
        node("MatMul", ["earlier", "used"], ["heard"]),
        *_expected(),
        node("Add", ["heard", "expected"], ["logits"]),
        node("Sigmoid", ["logits"], ["probabilities"]),
    ]
    inputs = [*_state(spec), _token_id(), *_routing(spec, spec.num_layers)]
    if hidden_size:
        inputs.append(_value("hidden", TensorProto.FLOAT, ["B", hidden_size]))
        nodes[-2:] = [
            node("Add", ["heard", "expected"], ["without"]),
            node("ReduceMean", ["hidden", "middle"], ["mean"], keepdims=1),
            node("Unsqueeze", ["mean", "last"], ["mean_wide"]),
            node("Add", ["without", "mean_wide"], ["logits"]),
            node("Sigmoid", ["logits"], ["probabilities"]),
        ]
    return _graph("predict", nodes, spec, inputs, [_per_expert("probabilities", spec)], bias)


def _advance_graph(spec: RoutingSpec) -> bytes:
    node = helper.make_node
    nodes = [
        *_used(),
        node("Add", ["average", "used"], ["both"]),
        node("Mul", ["both", "half"], ["next_average"]),
        node("Cast", ["token_id"], ["token_int"], to=TensorProto.INT32),
        node("Unsqueeze", ["token_int", "middle"], ["next_last_token"]),
    ]
    inputs = [*_state(spec), _token_id(), *_routing(spec, spec.num_layers)]
    outputs = [_per_expert("next_average", spec), _value("next_last_token", TensorProto.INT32, ["B", 1])]
    return _graph("advance", nodes, spec, inputs, outputs)


def _outlook_graph(spec: RoutingSpec) -> bytes:
    nodes = [helper.make_node("Sigmoid", ["average"], ["uses"])]
    return _graph("outlook", nodes, spec, [_per_expert("average", spec)], [_per_expert("uses", spec)])


def _begin_graph(spec: RoutingSpec, bias: float) -> bytes:
    return _graph(
        "begin", _expected(), spec, [*_state(spec), _token_id()], [_per_expert("expected", spec)], bias
    )


def _step_graph(spec: RoutingSpec) -> bytes:
    """Reads nothing of the state: all that is needed of it is in `expected`."""
    node = helper.make_node
    nodes = [
        *_used(),
        # A layer of -1 counts from the end here; nothing was used in it.
        node("Cast", ["layers"], ["layer_ids"], to=TensorProto.INT64),
        node("OneHot", ["layer_ids", "layer_depth", "off_on"], ["layer_onehot"], axis=1),
        node("MatMul", ["layer_onehot", "used"], ["used_by_layer"]),
        node("MatMul", ["earlier", "used_by_layer"], ["heard_now"]),
        node("Add", ["heard", "heard_now"], ["next_heard"]),
        node("Add", ["next_heard", "expected"], ["logits"]),
        node("Sigmoid", ["logits"], ["probabilities"]),
    ]
    inputs = [
        _per_expert("expected", spec),
        _per_expert("heard", spec),
        _value("layers", TensorProto.INT32, ["B", "M"]),
        *_routing(spec, "M"),
    ]
    return _graph(
        "step", nodes, spec, inputs, [_per_expert("next_heard", spec), _per_expert("probabilities", spec)]
    )


def _graph(
    name: str,
    nodes: list[onnx.NodeProto],
    spec: RoutingSpec,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    bias: float = 0.0,
) -> bytes:
    needed = {tensor for node in nodes for tensor in node.input}
    constants = _constants(spec) | {"bias": np.array(bias, np.float32)}
    initializers = [numpy_helper.from_array(value, key) for key, value in constants.items() if key in needed]
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="toy"
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
