"""In 8 bits a graph answers nearly the same, and each row of a batch as if it were alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from training.quantization import BLOCK, LARGEST, ZERO, blocks_of, quantized

WIDTH, OUTPUTS = 96, 128
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(WIDTH, OUTPUTS)).astype(np.float32)
BIAS = RNG.normal(size=OUTPUTS).astype(np.float32)
X = RNG.normal(size=(5, WIDTH)).astype(np.float32)


def graph(*nodes: onnx.NodeProto, **weights: np.ndarray) -> bytes:
    """[B, 96] -> [B, 128]."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", OUTPUTS])],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    content: bytes = helper.make_model(made, opset_imports=opset, ir_version=10).SerializeToString()
    return content


GRAPHS = {
    "product": graph(helper.make_node("MatMul", ["x", "w"], ["y"]), w=WEIGHT),
    "transposed, with a bias": graph(
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1), w=WEIGHT.T.copy(), b=BIAS
    ),
    "with a bias that is worked out": graph(
        helper.make_node("ReduceSum", ["x", "axes"], ["c"], keepdims=1),
        helper.make_node("Gemm", ["x", "w", "c"], ["y"]),
        w=WEIGHT,
        axes=np.array([1]),
    ),
    "of a weight that is worked out": graph(
        helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        half=WEIGHT.astype(np.float16),
    ),
}


def answer(content: bytes, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def kinds(content: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_from_string(content).graph.node}


@pytest.mark.parametrize("content", GRAPHS.values(), ids=GRAPHS.keys())
def test_a_product_is_nearly_the_same_and_a_fraction_of_the_size(content: bytes) -> None:
    small = quantized(content)
    assert "MatMulNBits" in kinds(small)
    assert not kinds(small) & {"MatMul", "Gemm", "Cast"}
    assert len(small) < 0.75 * len(content)
    expected = answer(content, X)
    np.testing.assert_allclose(answer(small, X), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("content", GRAPHS.values(), ids=GRAPHS.keys())
def test_a_row_does_not_depend_on_the_others(content: bytes) -> None:
    small = quantized(content)
    loud = np.concatenate([X, 100 * X])
    alone = np.concatenate([answer(small, row[None]) for row in loud])
    np.testing.assert_allclose(answer(small, loud), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [OUTPUTS, OUTPUTS - 1], ids=["blocks", "whole rows"])
def test_a_table_that_is_looked_up_is_nearly_the_same_and_half_the_size(width: int) -> None:
    table = RNG.normal(size=(400, OUTPUTS))[:, :width].astype(np.float16)
    content = graph(
        helper.make_node("Cast", ["half"], ["table"], to=TensorProto.FLOAT),
        helper.make_node("ArgMax", ["x"], ["row"], axis=1, keepdims=0),
        helper.make_node("Gather", ["table", "row"], ["y"]),
        half=table,
    )
    small = quantized(content)
    assert len(small) < 0.6 * len(content)
    np.testing.assert_allclose(answer(small, X), table[X.argmax(1)], atol=np.abs(table).max() / LARGEST / 2)


def test_small_factors_stay_as_they_are() -> None:
    narrow = graph(
        helper.make_node("MatMul", ["x", "a"], ["z"]),
        helper.make_node("MatMul", ["z", "b"], ["y"]),
        a=WEIGHT[:, :2],
        b=WEIGHT[:2],
    )
    assert kinds(quantized(narrow)) == {"MatMul"}


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 3 * BLOCK)),
        elements=st.floats(-9, 9, width=32),
    )
)
def test_a_weight_is_off_by_half_a_step_at_most(weight: np.ndarray) -> None:
    numbers, scales = blocks_of(weight)
    restored = (numbers.astype(np.float64) - ZERO) * scales[..., None]
    restored = restored.reshape(len(weight), -1)[:, : weight.shape[1]]
    steps = np.repeat(scales, BLOCK, axis=1)[:, : weight.shape[1]]
    assert (np.abs(restored - weight) <= 0.5001 * steps + 1e-9).all()
    assert numbers.min() >= ZERO - LARGEST
