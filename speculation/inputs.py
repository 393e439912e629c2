"""What may go into the graphs: arrays checked before they reach native code.

expert ids outside the table would be read from whatever lies beside it
"""

from __future__ import annotations

from typing import Any

import numpy as np

from speculation.errors import InputInvalid
from traces.spec import RoutingSpec

Array = np.ndarray[Any, Any]
# Comparing with a dtype made once is ten times faster than with np.int32.
INT32, INT64, FLOAT32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)


def check_array(name: str, array: object, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Raises InputInvalid where `array` is not a numpy array of this dtype and shape."""
    if isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == shape:
        return
    came = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
    raise InputInvalid(
        f"{name} is {came}, expected {dtype.name} {list(shape)}.",
        remedy="Convert it: nothing is guessed about what an array of another kind means.",
    )


def check_experts(experts: Array, spec: RoutingSpec) -> None:
    """Raises InputInvalid where an id is out of range or a layer is seen in some of its slots only."""
    # Plain reductions: the methods (`experts.min()`) and `any()` cost half a microsecond more each.
    lowest = np.minimum.reduce(experts, axis=None)
    if lowest < -1 or np.maximum.reduce(experts, axis=None) >= spec.num_experts:
        row, layer, slot = np.argwhere((experts < -1) | (experts >= spec.num_experts))[0]
        raise InputInvalid(
            f"experts[{row}, {layer}, {slot}] is {experts[row, layer, slot]}, "
            f"expected -1 to {spec.num_experts - 1}.",
            remedy="Use the model's logical expert ids, and -1 for layers not seen yet.",
        )
    if lowest == -1:
        unseen = experts < 0
        mixed = unseen != unseen[:, :, :1]
        if np.count_nonzero(mixed):
            row, layer, _ = np.argwhere(mixed)[0]
            raise InputInvalid(
                f"experts[{row}, {layer}] is {experts[row, layer].tolist()}: seen in some of its slots only.",
                remedy=f"Give all {spec.top_k} experts of a layer, or -1 in every slot.",
            )


def check_hidden(hidden: object, shape: tuple[int, int]) -> None:
    """Raises InputInvalid where it is no float32 array of this shape, or has a number that is not finite."""
    check_array("hidden", hidden, FLOAT32, shape)
    if not np.isfinite(hidden).all():  # type: ignore[call-overload]
        raise InputInvalid(
            "hidden has a number that is not finite.",
            remedy="Leave it out where it is unknown; beyond float16 clip it, as a recording does.",
        )


def check_gates(gates: Array, experts: Array) -> None:
    """Raises InputInvalid where a gate is negative or not finite, or a seen layer's gates are all zero.

    The gates of layers not seen are ignored, but a NaN would spread even from there.
    """
    # The usual case; NaN is not in it.
    if np.minimum.reduce(gates, axis=None) > 0.0 and np.maximum.reduce(gates, axis=None) < np.inf:
        return
    remedy = "Give the router's weights after its softmax, or None where they are unknown."
    wrong = ~((gates >= 0.0) & (gates < np.inf))
    if wrong.any():
        row, layer, slot = np.argwhere(wrong)[0]
        came = gates[row, layer, slot]
        raise InputInvalid(
            f"gates[{row}, {layer}, {slot}] is {came}, expected a finite weight from 0.", remedy=remedy
        )
    empty = (experts[:, :, 0] >= 0) & (gates.sum(axis=-1) == 0.0)
    if empty.any():
        row, layer = np.argwhere(empty)[0]
        raise InputInvalid(f"gates[{row}, {layer}] are all 0 in a layer that was seen.", remedy=remedy)
