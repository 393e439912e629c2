"""Operators that ONNX has and torch says in several: one operator costs ONNX Runtime half a microsecond.

predictors -> shares, rows_at, sum_of_rows, falling, looked_up -> TRANSLATIONS -> `training.onnx_graph`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op
from torch import Tensor

from training.dataset import TINY


@torch.library.custom_op("specmoe::shares", mutates_args=())
def shares(gates: Tensor) -> Tensor:
    """Gates [*, K], from 0, each divided by the sum of its row; all 0 where the sum is."""
    return gates / gates.sum(-1, keepdim=True).clamp(min=TINY)


@shares.register_fake
def _(gates: Tensor) -> Tensor:
    return torch.empty_like(gates)


def _shares(gates: Any) -> Any:
    return op.LpNormalization(gates, axis=-1, p=1)


@torch.library.custom_op("specmoe::rows_at", mutates_args=())
def rows_at(window: Tensor, places: Tensor) -> Tensor:
    """Of each window [B, T, F] the rows at its places [B, *N], int64: [B, *N, F]."""
    return torch.stack([rows[at] for rows, at in zip(window, places, strict=True)])


@rows_at.register_fake
def _(window: Tensor, places: Tensor) -> Tensor:
    return window.new_empty((*places.shape, window.shape[-1]))


def _rows_at(window: Any, places: Any) -> Any:
    return op.GatherND(window, op.Unsqueeze(places, _ints(-1)), batch_dims=1)


@torch.library.custom_op("specmoe::sum_of_rows", mutates_args=())
def sum_of_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, *N, n*D], n side by side, times their weights [B, *N, n], summed over all but B: [B, D]."""
    return torch.einsum("bn,bnd->bd", weights.flatten(1), rows.reshape(*weights.shape, -1).flatten(1, -2))


@sum_of_rows.register_fake
def _(weights: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], rows.shape[-1] // weights.shape[-1]))


def _sum_of_rows(weights: Any, rows: Any) -> Any:
    width = rows.shape[-1] // weights.shape[-1]
    # 0 keeps the batch axis. Multiplied by a single line of weights, ONNX Runtime need not pack the rows.
    line, lines = op.Reshape(weights, _ints(0, 1, -1)), op.Reshape(rows, _ints(0, -1, width))
    return op.Squeeze(op.MatMul(line, lines), _ints(1))


@torch.library.custom_op("specmoe::falling", mutates_args=())
def falling(values: Tensor) -> Tensor:
    """Places [*, K] of the values of each row, largest first; of equal ones, the first first."""
    return values.argsort(dim=-1, descending=True, stable=True)


@falling.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=torch.int64)


def _falling(values: Any) -> Any:
    _, places = op.TopK(values, _ints(values.shape[-1]))
    return places


@torch.library.custom_op("specmoe::looked_up", mutates_args=())
def looked_up(table: Tensor, places: Tensor) -> Tensor:
    """Of a table [N] the entries at some places, of any shape."""
    return table[places.long()]


@looked_up.register_fake
def _(table: Tensor, places: Tensor) -> Tensor:
    return table.new_empty(places.shape)


def _looked_up(table: Any, places: Any) -> Any:
    return op.Gather(table, places)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.specmoe.shares.default: _shares,
    torch.ops.specmoe.rows_at.default: _rows_at,
    torch.ops.specmoe.sum_of_rows.default: _sum_of_rows,
    torch.ops.specmoe.falling.default: _falling,
    torch.ops.specmoe.looked_up.default: _looked_up,
}
