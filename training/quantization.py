"""Weights of a graph in 8 bits: a quarter of the memory that a call reads, and waits for.

onnx_graph -> quantized -> export

A constant factor of a product is cut, column by column, into blocks of 64 weights, each with a scale of its
own. ONNX Runtime's `MatMulNBits` rounds what it multiplies them with to 8 bits, too, block by block and row
by row: so a sequence's forecast does not depend on which others are in its batch.

Tables that are looked up are cut along their rows; they are widened once, when the graph is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Float32, Int8, UInt8
from onnx import helper, numpy_helper

# 128: up to twice as coarse, and no faster. 32: twice the scales, and slower.
BLOCK = 64
BITS = 8
ZERO = 128
LARGEST = 127
# Smaller factors are read fast as they are, and say more in each weight.
SMALLEST = 4096
DOMAIN = "com.microsoft"
# Both factors in 8 bits; otherwise ONNX Runtime makes them 32 bits wide first.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class _Product:
    """A node that multiplies by a constant: x @ weight, or its transpose, plus bias, "" for none.

    fixed: whether the bias is a constant, too.
    """

    node: onnx.NodeProto
    weight: str
    transposed: bool
    bias: str
    fixed: bool


def quantized(graph: bytes) -> bytes:
    """The same graph, its large constant factors and tables in 8 bits."""
    model = onnx.load_from_string(graph)
    constants = _constants(model.graph)
    products = [product for node in model.graph.node if (product := _product(node, constants))]
    weights = _values(model, constants, {product.weight for product in products})
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for product in products:
        weight = weights[product.weight]
        weight = weight if product.transposed else weight.T  # N K
        if weight.ndim == 2 and weight.size >= SMALLEST:
            name = f"{product.node.output[0]}_weight"
            found, initializers = _in_blocks(product, np.ascontiguousarray(weight), name)
            replaced[product.node.output[0]] = found
            model.graph.initializer.extend(initializers)
    _replace(model.graph, replaced)
    _drop_unused(model.graph)
    _replace(model.graph, _tables(model.graph))
    _drop_unused(model.graph)
    if replaced:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model.SerializeToString()


def blocks_of(
    weight: Float32[np.ndarray, "N K"],
) -> tuple[UInt8[np.ndarray, "N M 64"], Float32[np.ndarray, "N M"]]:
    """(numbers, scales) of M blocks a row, the last filled up with 0: a weight is (number - 128) * scale."""
    rows, width = weight.shape
    filled = np.pad(weight, ((0, 0), (0, -width % BLOCK))).reshape(rows, -1, BLOCK)
    scales = np.maximum(np.abs(filled).max(axis=-1) / LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
    return (np.rint(filled / scales[..., None]) + ZERO).astype(np.uint8), scales


def _tables(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """What takes the place of the nodes that widen tables in half precision; adds what it reads."""
    halves = {i.name: i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT16}
    replaced = {}
    for node in graph.node:
        half = halves.get(node.input[0]) if node.op_type == "Cast" else None
        (name,) = node.output if half else ("",)
        if half is None or np.prod(half.dims) < SMALLEST or len(half.dims) < 2:
            continue
        numbers, scales = rows_of(numpy_helper.to_array(half).astype(np.float32))
        parts = {"rows": numbers, "scales": scales, "shape": np.array(half.dims, np.int64)}
        graph.initializer.extend(numpy_helper.from_array(part, f"{name}.{of}") for of, part in parts.items())
        replaced[name] = [
            helper.make_node("Cast", [f"{name}.rows"], [f"{name}.cast"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.cast", f"{name}.scales"], [f"{name}.scaled"]),
            helper.make_node("Reshape", [f"{name}.scaled", f"{name}.shape"], [name]),
        ]
    return replaced


def rows_of(
    table: Float32[np.ndarray, "*N C"],
) -> tuple[Int8[np.ndarray, "*N M 64"], Float32[np.ndarray, "*N M 1"]]:
    """(numbers, scales) of M blocks a row, or of rows as they are where blocks do not fill them up.

    An entry is number * scale.
    """
    block = BLOCK if table.shape[-1] % BLOCK == 0 else table.shape[-1]
    blocks = table.reshape(*table.shape[:-1], -1, block)
    scales = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True) / LARGEST, np.finfo(np.float32).tiny)
    return np.rint(blocks / scales).astype(np.int8), scales.astype(np.float32)


def _replace(graph: onnx.GraphProto, replaced: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Others instead of the nodes whose first output has a name among these."""
    nodes = [new for node in graph.node for new in replaced.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(nodes)


def _product(node: onnx.NodeProto, constants: set[str]) -> _Product | None:
    """The node as a product with a constant, where it is one that can be replaced."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constants or node.input[0] in constants:
        return None
    said = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if said.get("transA", 0) or said.get("alpha", 1.0) != 1.0 or said.get("beta", 1.0) != 1.0:
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    return _Product(node, node.input[1], bool(said.get("transB", 0)), bias, bias in constants)


def _in_blocks(
    product: _Product, weight: Float32[np.ndarray, "N K"], name: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    numbers, scales = blocks_of(weight)
    (result,) = product.node.output
    apart = product.bias and not product.fixed
    inputs = [product.node.input[0], name, f"{name}_scales", "", "", "" if apart else product.bias]
    multiplied = f"{result}_multiplied" if apart else result
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        [multiplied],
        domain=DOMAIN,
        K=weight.shape[1],
        N=weight.shape[0],
        bits=BITS,
        block_size=BLOCK,
        accuracy_level=ACCURACY_LEVEL,
    )
    initializers = [numpy_helper.from_array(numbers, name), numpy_helper.from_array(scales, f"{name}_scales")]
    added = [helper.make_node("Add", [multiplied, product.bias], [result])] if apart else []
    return [node, *added], initializers


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Every tensor that follows from weights alone. Nodes come in an order in which they can be run."""
    found = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        if all(not name or name in found for name in node.input):
            found |= set(node.output)
    return found


def _values(model: onnx.ModelProto, constants: set[str], names: Iterable[str]) -> dict[str, np.ndarray]:
    """What these constants are, worked out as the runtime would."""
    wanted = sorted(names)
    if not wanted:
        return {}
    known = onnx.ModelProto()
    known.CopyFrom(model)
    del known.graph.node[:], known.graph.input[:], known.graph.output[:]
    known.graph.node.extend(node for node in model.graph.node if set(node.output) <= constants)
    known.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        known.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(wanted, session.run(wanted, {}), strict=True))


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Without the nodes and weights that nothing reads any longer."""
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used & set(node.output):
            used |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [initializer for initializer in graph.initializer if initializer.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
