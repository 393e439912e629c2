"""The golden answer: made up by formula, and noticed when it changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from model_store.manifest import PREDICT
from speculation.errors import GoldenMismatch
from speculation.golden import TOLERANCE, check_golden, golden_inputs, golden_probabilities
from speculation.runtime import Speculator
from tests.toy_version import TOY_SPEC, toy_stored, with_graphs
from traces.spec import RoutingSpec

SPECS = [TOY_SPEC, RoutingSpec("one", 1, 2, 1), RoutingSpec("all", 3, 4, 4), RoutingSpec("wide", 26, 64, 6)]
by_name = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model)


@by_name
def test_golden_routing_obeys_the_contract(spec):
    token_ids, experts, gates = golden_inputs(spec)
    assert (token_ids.dtype, experts.dtype, gates.dtype) == (np.int64, np.int32, np.float32)
    assert experts.shape == gates.shape == (len(token_ids), spec.num_layers, spec.top_k)
    assert experts.min() >= 0 and experts.max() < spec.num_experts
    assert all(len(set(routed)) == spec.top_k for routed in experts.reshape(-1, spec.top_k).tolist())
    np.testing.assert_allclose(gates.sum(axis=-1), 1.0, rtol=1e-6)
    assert gates.min() > 0


@by_name
def test_a_version_passes_its_own_check(spec):
    check_golden(Speculator(toy_stored(spec)))


def test_rows_of_seen_layers_are_zero_and_the_others_are_not():
    probabilities = golden_probabilities(Speculator(toy_stored(), provider="cpu"))
    assert not probabilities[:2].any()
    assert probabilities[2:].all()


def test_golden_inputs_never_change():
    """Published manifests hold the answers to exactly these."""
    token_ids, experts, gates = golden_inputs(TOY_SPEC)
    assert token_ids.tolist() == [11, -1, 2011, 11]
    assert experts[3].tolist() == [[7, 0], [2, 3], [5, 6], [0, 1]]
    np.testing.assert_allclose(gates[3], [[1 / 4, 3 / 4], [2 / 3, 1 / 3], [3 / 5, 2 / 5], [1 / 4, 3 / 4]])


@pytest.mark.parametrize("sign", [-1, 1])
def test_another_answer_is_told_beside_the_promised_one(sign):
    toy = toy_stored()
    golden = np.array(toy.manifest.golden)
    golden[3, 5] += sign * 2 * TOLERANCE
    manifest = toy.manifest.model_copy(update={"golden": tuple(map(tuple, golden.tolist()))})
    with pytest.raises(
        GoldenMismatch, match=r"toy/1 predicts 0\.\d+ for layer 3, expert 5 on cpu, .*promises 0\."
    ):
        check_golden(Speculator(replace(toy, manifest=manifest), provider="cpu"))


def test_a_difference_of_rounding_passes():
    toy = toy_stored()
    golden = np.array(toy.manifest.golden) + TOLERANCE / 2
    manifest = toy.manifest.model_copy(update={"golden": tuple(map(tuple, golden.tolist()))})
    check_golden(Speculator(replace(toy, manifest=manifest), provider="cpu"))


@pytest.mark.parametrize("bias", [np.nan, np.inf])
def test_what_is_no_probability_is_refused(bias):
    """With the sigmoid taken away, logits come out; NaN comes through it."""
    toy = toy_stored()
    model = onnx.load_from_string(toy.graphs[PREDICT])
    for tensor in model.graph.initializer:
        if tensor.name == "bias":
            tensor.CopyFrom(numpy_helper.from_array(np.array(bias, np.float32), "bias"))
    model.graph.node[-1].op_type = "Identity"
    with pytest.raises(
        GoldenMismatch, match=rf"toy/1 predicts {bias} for layer 2, expert 0, expected a probability"
    ):
        check_golden(Speculator(with_graphs(toy, {PREDICT: model.SerializeToString()}), provider="cpu"))
