"""What a message may say of a model's routing, whichever way it was written. Small messages are the usual
ones: a few numbers are checked faster by Python than by numpy.

messages -> checks -> `Hub`

.venv/bin/python -m pytest tests/service/stream/test_checks.py
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from service.errors import MessageInvalid
from service.schemas import MAX_GATE
from traces.spec import RoutingSpec

# Up to so many numbers Python's own loops are faster.
FEW = 32
# In float32, as gates come, 1e30 is a little more than 1e30.
LARGEST_GATE = float(np.float32(MAX_GATE))
IDS_REMEDY = "Use the model's logical expert ids, each at most once a layer."
GATES_REMEDY = "Send the router's weights as they are, or leave gates out where they are unknown."


def check_experts(experts: np.ndarray[Any, Any], spec: RoutingSpec) -> None:
    """Raises MessageInvalid where an id of `experts` [n, m, K] is out of range or stands twice in a layer."""
    if experts.size <= FEW:
        for layers in experts.tolist():
            for slots in layers:
                if max(slots) >= spec.num_experts or min(slots) < 0 or len(set(slots)) < spec.top_k:
                    raise _wrong_experts(experts, spec)
        return
    ordered = np.sort(experts, axis=-1)
    if (
        ordered[..., -1].max() >= spec.num_experts
        or ordered[..., 0].min() < 0
        or (ordered[..., 1:] == ordered[..., :-1]).any()
    ):
        raise _wrong_experts(experts, spec)


def check_gates(gates: np.ndarray[Any, Any]) -> None:
    """MessageInvalid where a weight of `gates` [n, m, K] is not 0 to 1e30, or a layer has none above 0."""
    if gates.size <= FEW:
        for layers in gates.tolist():
            for slots in layers:
                # NaN makes the sum no number, which is not above 0.
                if not (min(slots) >= 0.0 and math.fsum(slots) > 0.0 and max(slots) <= LARGEST_GATE):
                    raise _wrong_gates(gates)
        return
    if not (((gates >= 0.0) & (gates <= LARGEST_GATE)).all() and (gates.sum(axis=-1) > 0.0).all()):
        raise _wrong_gates(gates)


def check_token_ids(token_ids: np.ndarray[Any, Any]) -> None:
    """Raises MessageInvalid where an id is below -1."""
    for position, token_id in enumerate(token_ids.tolist()):
        if token_id < -1:
            raise MessageInvalid(
                f"token_ids[{position}] is {token_id}, expected -1 (unknown) or more.",
                remedy="Use ids of the model's own tokenizer.",
            )


def _wrong_experts(experts: np.ndarray[Any, Any], spec: RoutingSpec) -> MessageInvalid:
    out_of_range = (experts < 0) | (experts >= spec.num_experts)
    if out_of_range.any():
        row, layer, slot = np.argwhere(out_of_range)[0]
        return MessageInvalid(
            f"experts[{row}][{layer}][{slot}] is {experts[row, layer, slot]}, "
            f"expected 0 to {spec.num_experts - 1}.",
            remedy=IDS_REMEDY,
        )
    ordered = np.sort(experts, axis=-1)
    row, layer, _ = np.argwhere(ordered[..., 1:] == ordered[..., :-1])[0]
    return MessageInvalid(
        f"experts[{row}][{layer}] is {experts[row, layer].tolist()}: not all different.", remedy=IDS_REMEDY
    )


def _wrong_gates(gates: np.ndarray[Any, Any]) -> MessageInvalid:
    wrong = ~((gates >= 0.0) & (gates <= LARGEST_GATE))
    if wrong.any():
        row, layer, slot = np.argwhere(wrong)[0]
        return MessageInvalid(
            f"gates[{row}][{layer}][{slot}] is {gates[row, layer, slot]}, expected 0 to {MAX_GATE:g}.",
            remedy=GATES_REMEDY,
        )
    row, layer = np.argwhere(gates.sum(axis=-1) <= 0.0)[0]
    return MessageInvalid(f"gates[{row}][{layer}] are all 0.", remedy=GATES_REMEDY)
