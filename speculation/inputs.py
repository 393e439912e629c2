"""What may go into the graphs: arrays checked before they reach native code.

expert ids outside the table would be read from whatever lies beside it
"""

from __future__ import annotations

from typing import Any

import numpy as np

from speculation.errors import InputInvalid
from traces.spec import RoutingSpec

Array = np.ndarray[Any, Any]


def check_array(name: str, array: object, dtype: Any, shape: tuple[int, ...]) -> None:
    """Raises InputInvalid where `array` is not a numpy array of this dtype and shape."""
    if isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == shape:
        return
    came = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
    raise InputInvalid(
        f"{name} is {came}, expected {np.dtype(dtype).name} {list(shape)}.",
        remedy="Convert it: nothing is guessed about what an array of another kind means.",
    )


def check_experts(experts: Array, spec: RoutingSpec) -> None:
    """Raises InputInvalid where an id is out of range or a layer is seen in some of its slots only."""
    lowest = experts.min(initial=0)
    if lowest < -1 or experts.max(initial=-1) >= spec.num_experts:
        row, layer, slot = np.argwhere((experts < -1) | (experts >= spec.num_experts))[0]
        raise InputInvalid(
            f"experts[{row}, {layer}, {slot}] is {experts[row, layer, slot]}, "
            f"expected -1 to {spec.num_experts - 1}.",
            remedy="Use the model's logical expert ids, and -1 for layers not seen yet.",
        )
    if lowest == -1:
        unseen = experts < 0
        mixed = unseen.any(axis=-1) & ~unseen.all(axis=-1)
        if mixed.any():
            row, layer = np.argwhere(mixed)[0]
            raise InputInvalid(
                f"experts[{row}, {layer}] is {experts[row, layer].tolist()}: seen in some of its slots only.",
                remedy=f"Give all {spec.top_k} experts of a layer, or -1 in every slot.",
            )


def check_gates(gates: Array, experts: Array) -> None:
    """Raises InputInvalid where a seen layer's gates are negative, not finite, or all zero."""
    # One comparison for the usual case; NaN fails it too. The gates of layers not seen are ignored.
    if gates.min(initial=1.0) > 0.0 and gates.max(initial=1.0) < np.inf:
        return
    seen = experts >= 0
    wrong = seen & ~((gates >= 0.0) & (gates < np.inf))
    if wrong.any():
        row, layer, slot = np.argwhere(wrong)[0]
        raise InputInvalid(
            f"gates[{row}, {layer}, {slot}] is {gates[row, layer, slot]}, expected a finite weight from 0.",
            remedy="Give the router's weights after its softmax, or None where they are unknown.",
        )
    empty = seen.all(axis=-1) & (np.where(seen, gates, 0.0).sum(axis=-1) == 0.0)
    if empty.any():
        row, layer = np.argwhere(empty)[0]
        raise InputInvalid(
            f"gates[{row}, {layer}] are all 0 in a layer that was seen.",
            remedy="Give the router's weights after its softmax, or None where they are unknown.",
        )
