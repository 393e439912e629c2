"""A torch module as the bytes of an ONNX graph: batch axis free, large weights in half precision.

trained predictor -> served() -> onnx_graph -> predict.onnx, advance.onnx, begin.onnx, step.onnx
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxscript import opset20 as op
from torch import Tensor, nn

from training.errors import ExportFailed
from training.operators import TRANSLATIONS

OPSET = 20
# Smaller tensors stay as they are: nothing is gained.
HALVED_FROM = 1024


def to_onnx(
    module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], *, told: Sequence[str] = ()
) -> bytes:
    """Export `module`, whose forward(*inputs) takes `inputs` in their order; axis 0 becomes the free "batch".

    told: inputs whose axis 1 is free, too, and the same for all. Weights are expected to be representable in
    half precision (see `halve`).
    """
    batch, layers = torch.export.Dim("batch", min=1), torch.export.Dim("told", min=1)
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(tuple({0: batch} | ({1: layers} if name in told else {}) for name in inputs),),
            custom_translation_table=LEAN,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportFailed("torch.onnx returned no graph.", remedy="Report this with the version of torch.")
    graph = program.model_proto
    for argument in graph.graph.input:  # of one that is not used, the exporter fixes the batch
        argument.type.tensor_type.shape.dim[0].dim_param = "batch"
    _strip(graph)
    _store_halved(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph.SerializeToString()


def _index_select(x: Any, axis: int, index: Any) -> Any:
    """The exporter reshapes and casts an index that is fit as it is."""
    return op.Gather(x, index, axis=axis)


# Each operator saved is half a microsecond saved when served.
LEAN: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.index_select.default: _index_select,
    **TRANSLATIONS,
}


@torch.no_grad()
def halve(module: nn.Module) -> None:
    """Round every weight to half precision and back, so that torch and the exported graph have the same."""
    for parameter in module.parameters():
        parameter.copy_(parameter.half().float())


def _strip(graph: onnx.ModelProto) -> None:
    """Remove what the exporter noted of the machine: source paths, stack traces, its own bookkeeping."""
    del graph.metadata_props[:]
    graph.doc_string = ""
    graph.graph.doc_string = ""
    for item in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.graph.metadata_props[:]
    del graph.graph.value_info[:]
    for initializer in graph.graph.initializer:
        del initializer.metadata_props[:]
        initializer.doc_string = ""


def _store_halved(graph: onnx.ModelProto) -> None:
    """Keep large float32 weights as float16 and a Cast, which ONNX Runtime folds away at load."""
    casts = []
    for initializer in graph.graph.initializer:
        values = numpy_helper.to_array(initializer)
        halved = values.astype(np.float16) if values.dtype == np.float32 else None
        if halved is None or values.size < HALVED_FROM or (halved != values).any():
            continue
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(halved, f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of torchvision and of its own deprecations; neither is for our user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
