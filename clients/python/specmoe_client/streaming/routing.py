"""What the program tells, checked as the service would: nothing wrong is sent, or kept to be sent again.

Stream.route -> routing.py -> session.py
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from specmoe_client.errors import RequestInvalid
from specmoe_client.questions import UNKNOWN_TOKEN, Token
from specmoe_client.streaming.frames import Experts, Gates, Welcome

# A weight above this could not be summed in float32; the service refuses it.
MAX_GATE = 1e30
# Up to so many numbers Python's own loops are faster than numpy's calls.
FEW = 32
EXPERTS_REMEDY = (
    "Give integers [n, K] for the next layer or [n, m, K] for the next m, in the sequences' order."
)
IDS_REMEDY = "Use the model's logical expert ids, each at most once a layer."
GATES_REMEDY = "Give the router's weights as they are, or None where they are unknown."


def wrong(message: str, remedy: str) -> RequestInvalid:
    """The error for what the program must mend; nothing was sent."""
    return RequestInvalid(message, remedy=remedy, status=422, code="invalid_request", request_id="")


def as_layers(experts: npt.ArrayLike, count: int) -> npt.NDArray[Any]:
    """Integers `[n, m, K]` of n = `count` sequences. Raises RequestInvalid."""
    array = np.asarray(experts)
    if array.ndim == 2:
        array = array[:, None]
    if array.ndim != 3 or len(array) != count or not array.size or array.dtype.kind not in "iu":
        raise wrong(
            f"experts is {array.dtype} {list(np.shape(experts))} for {count} sequences.", EXPERTS_REMEDY
        )
    return array


def checked_experts(experts: npt.ArrayLike, count: int, shape: Welcome) -> Experts:
    """`[n, m, K]` as they are sent. Raises RequestInvalid."""
    array = as_layers(experts, count)
    if array.shape[2] != shape.top_k:
        raise wrong(
            f"experts has {array.shape[2]} of a layer, but the model's top_k is {shape.top_k}.",
            EXPERTS_REMEDY,
        )
    if not _sound_experts(array, shape.num_experts):
        raise wrong(
            f"experts has an id outside 0 to {shape.num_experts - 1}, or one twice in a layer.", IDS_REMEDY
        )
    return np.ascontiguousarray(array, shape.expert)


def checked_gates(gates: npt.ArrayLike, experts: Experts) -> Gates:
    """Float32 of the experts' shape. Raises RequestInvalid."""
    array = np.asarray(gates, "<f4")
    if array.shape != experts.shape:
        if array.size != experts.size or array.ndim != 2:
            raise wrong(f"gates is {list(array.shape)}, experts {list(experts.shape)}.", GATES_REMEDY)
        array = array.reshape(experts.shape)
    if not _sound_gates(array):
        raise wrong(
            f"gates has a weight outside 0 to {MAX_GATE:g}, or a layer with none above 0.", GATES_REMEDY
        )
    return array


def checked_token_ids(token_ids: npt.ArrayLike | None, count: int) -> npt.NDArray[np.int32]:
    """int32 `[n]`; -1 where they are unknown. Raises RequestInvalid."""
    if token_ids is None:
        return np.full(count, UNKNOWN_TOKEN, "<i4")
    array = np.asarray(token_ids)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise wrong(
            f"token_ids is {array.dtype} {list(array.shape)} for {count} sequences.", "Give one each."
        )
    if count and not -1 <= array.min() <= array.max() < 2**31:
        raise wrong(
            "token_ids has one below -1 or beyond 31 bits.", "Give the model's own ids, -1 if unknown."
        )
    return array.astype("<i4")


def checked_token(token: Token, shape: Welcome) -> tuple[int, Experts, Gates | None]:
    """(token id, experts `[L, K]`, gates `[L, K]`) of a finished token. Raises RequestInvalid."""
    experts = checked_experts(np.asarray(token.experts)[None], 1, shape)
    if experts.shape[1] != shape.num_layers:
        raise wrong(
            f"A token of the context has {experts.shape[1]} layers, but the model has {shape.num_layers}.",
            "Give finished tokens: [L, K] each.",
        )
    gates = None
    if token.gates is not None and shape.uses_gates:
        gates = checked_gates(np.asarray(token.gates)[None], experts)[0]
    ids = checked_token_ids([UNKNOWN_TOKEN if token.token_id is None else token.token_id], 1)
    return int(ids[0]), experts[0], gates


def _sound_experts(experts: npt.NDArray[Any], num_experts: int) -> bool:
    if experts.size <= FEW:
        return all(
            min(slots) >= 0 and max(slots) < num_experts and len(set(slots)) == len(slots)
            for layers in experts.tolist()
            for slots in layers
        )
    ordered = np.sort(experts, axis=-1)
    return bool(
        ordered[..., 0].min() >= 0
        and ordered[..., -1].max() < num_experts
        and (ordered[..., 1:] > ordered[..., :-1]).all()
    )


def _sound_gates(gates: Gates) -> bool:
    # A comparison with NaN is false, and NaN makes a sum, and numpy's least, NaN.
    if gates.size <= FEW:
        return all(
            min(slots) >= 0.0 and max(slots) <= MAX_GATE and math.fsum(slots) > 0.0
            for layers in gates.tolist()
            for slots in layers
        )
    largest = gates.max(axis=-1)
    return bool(gates.min() >= 0.0 and largest.min() > 0.0 and largest.max() <= MAX_GATE)
