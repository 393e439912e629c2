"""A checked request as arrays: every token of every sequence in one row, validated at once.

PredictRequest -> `to_batch` -> Batch -> `service.prediction`

.venv/bin/python -m pytest tests/service/test_malformed_requests.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from service.errors import BatchTooLarge, RequestInvalid
from service.schemas import PredictRequest, Sequence, Token
from traces.spec import RoutingSpec

Rows: TypeAlias = list[list[int]] | list[list[float]]

SPEC_REMEDY = "/v1/models tells the model's num_layers, num_experts and top_k."


@dataclass(frozen=True)
class Batch:
    """B sequences with N tokens in all: each sequence's context, oldest first, then its current token.

    current: row of each sequence's current token. context_tokens: how many rows before it are its context.
    seen: layers of the current token that are known. gates: None where no token has any.
    """

    token_ids: Int64[np.ndarray, "N"]
    experts: Int32[np.ndarray, "N L K"]
    gates: Float32[np.ndarray, "N L K"] | None
    current: Int64[np.ndarray, "B"]
    context_tokens: Int64[np.ndarray, "B"]
    seen: Int64[np.ndarray, "B"]


def check_size(request: PredictRequest, *, max_sequences: int, max_context_tokens: int) -> int:
    """The rows that its Batch will have. Raises BatchTooLarge where it asks for more work than is allowed."""
    sequences = len(request.sequences)
    if sequences > max_sequences:
        raise BatchTooLarge(
            f"sequences has {sequences} entries, at most {max_sequences} are allowed.",
            remedy="Split the batch, or raise SPECMOE_MAX_SEQUENCES.",
        )
    tokens = sum(len(sequence.context) for sequence in request.sequences)
    if tokens > max_context_tokens:
        raise BatchTooLarge(
            f"The contexts have {tokens} tokens in all, at most {max_context_tokens} are allowed.",
            remedy="Send the last tokens of each sequence only, or raise SPECMOE_MAX_CONTEXT_TOKENS.",
        )
    return sequences + tokens


def to_batch(request: PredictRequest, spec: RoutingSpec) -> Batch:
    """The request's sequences as arrays. Raises RequestInvalid naming what does not fit the model.

    That ids are in range and gates add up is left to the Speculator, which checks it anyway: see `misfit`.
    """
    sequences = request.sequences
    tokens = [token for sequence in sequences for token in (*sequence.context, sequence)]
    for row, token in enumerate(tokens):
        _check_shape(token, spec, request, row)
    lengths = [len(sequence.context) for sequence in sequences]
    return Batch(
        token_ids=np.array([-1 if token.token_id is None else token.token_id for token in tokens], np.int64),
        experts=_experts(tokens, spec),
        gates=_gates(tokens, spec),
        current=np.array([end - 1 for end in accumulate(length + 1 for length in lengths)], np.int64),
        context_tokens=np.array(lengths, np.int64),
        seen=np.array([len(sequence.experts) for sequence in sequences], np.int64),
    )


def joined(batches: list[Batch]) -> Batch:
    """Batches without context as one, in their order."""
    if len(batches) == 1:
        return batches[0]
    experts = np.concatenate([batch.experts for batch in batches])
    gates = None
    if any(batch.gates is not None for batch in batches):
        gates = np.concatenate(
            [np.ones(b.experts.shape, np.float32) if b.gates is None else b.gates for b in batches]
        )
    return Batch(
        token_ids=np.concatenate([batch.token_ids for batch in batches]),
        experts=experts,
        gates=gates,
        current=np.arange(len(experts)),
        context_tokens=np.zeros(len(experts), np.int64),
        seen=np.concatenate([batch.seen for batch in batches]),
    )


def misfit(batch: Batch, request: PredictRequest, spec: RoutingSpec) -> RequestInvalid | None:
    """Where in the request an id is out of range or gates do not add up, for a batch that was refused."""
    out_of_range = batch.experts >= spec.num_experts
    if out_of_range.any():
        row, layer, slot = np.argwhere(out_of_range)[0]
        return RequestInvalid(
            f"{_path(request, row)}.experts[{layer}][{slot}] is {batch.experts[row, layer, slot]}, "
            f"expected 0 to {spec.num_experts - 1}.",
            remedy=f"Use the model's logical expert ids. {SPEC_REMEDY}",
        )
    if batch.gates is not None and (nothing := batch.gates.sum(axis=-1) <= 0).any():
        row, layer = np.argwhere(nothing)[0]
        return RequestInvalid(
            f"{_path(request, row)}.gates[{layer}] adds up to 0, expected more.",
            remedy="Send the router's weights as they are, or null where they are unknown.",
        )
    return None


def wanted_layers(request: PredictRequest, spec: RoutingSpec, batch: Batch) -> Bool[np.ndarray, "B L"]:
    """Which layers each sequence is told about. Raises RequestInvalid for one that none still awaits."""
    unseen = np.arange(spec.num_layers) >= batch.seen[:, None]
    if request.layers is None:
        return unseen
    earliest = int(batch.seen.min())
    for position, layer in enumerate(request.layers):
        if not earliest <= layer < spec.num_layers:
            raise RequestInvalid(
                f"layers[{position}] is {layer}, expected {earliest} to {spec.num_layers - 1}: "
                f"{spec.model} has {spec.num_layers} layers and every sequence has seen {earliest}.",
                remedy="Ask for layers that a sequence has not seen, or leave `layers` out for all of them.",
            )
    asked = np.zeros(spec.num_layers, bool)
    asked[request.layers] = True
    return unseen & asked


def _experts(tokens: list[Token], spec: RoutingSpec) -> Int32[np.ndarray, "N L K"]:
    experts = np.full((len(tokens), spec.num_layers, spec.top_k), -1, np.int32)
    for row, token in enumerate(tokens):
        if token.experts:
            _fill(experts[row], token.experts)
    return experts


def _gates(tokens: list[Token], spec: RoutingSpec) -> Float32[np.ndarray, "N L K"] | None:
    """Gates, 1 where unknown: the graphs divide by their sum."""
    if all(token.gates is None for token in tokens):
        return None
    gates = np.ones((len(tokens), spec.num_layers, spec.top_k), np.float32)
    for row, token in enumerate(tokens):
        if token.gates:
            _fill(gates[row], token.gates)
    return gates


def _fill(target: np.ndarray[Any, Any], rows: Rows) -> None:
    """Write the seen layers. Flattened first: numpy takes half the time for it."""
    count = len(rows) * target.shape[1]
    target.reshape(-1)[:count] = np.fromiter(chain.from_iterable(rows), target.dtype, count)


def _check_shape(token: Token, spec: RoutingSpec, request: PredictRequest, row: int) -> None:
    """Raises RequestInvalid where a layer has not top_k slots, or the token too many or few layers."""
    layers, top_k = len(token.experts), spec.top_k
    fits = layers < spec.num_layers if isinstance(token, Sequence) else layers == spec.num_layers
    if not fits:
        raise _wrong_depth(token, spec, request, row)
    for layer, experts in enumerate(token.experts):
        if len(set(experts)) != top_k or len(experts) != top_k:
            raise _wrong_experts(experts, layer, spec, request, row)
    if token.gates is not None:
        _check_gates_shape(token.gates, layers, spec, request, row)


def _check_gates_shape(
    gates: list[list[float]], layers: int, spec: RoutingSpec, request: PredictRequest, row: int
) -> None:
    if len(gates) != layers:
        raise RequestInvalid(
            f"{_path(request, row)}.gates has {len(gates)} layers, its experts have {layers}.",
            remedy="Give the gates of every layer in `experts`, or null where they are unknown.",
        )
    for layer, slots in enumerate(gates):
        if len(slots) != spec.top_k:
            raise RequestInvalid(
                f"{_path(request, row)}.gates[{layer}] has {len(slots)} entries, "
                f"expected top_k = {spec.top_k}.",
                remedy=SPEC_REMEDY,
            )


def _wrong_depth(token: Token, spec: RoutingSpec, request: PredictRequest, row: int) -> RequestInvalid:
    path, layers = _path(request, row), len(token.experts)
    if not isinstance(token, Sequence):
        return RequestInvalid(
            f"{path}.experts has {layers} layers, expected {spec.num_layers}: a finished token has them all.",
            remedy=f"Leave unfinished tokens out of `context`. {SPEC_REMEDY}",
        )
    return RequestInvalid(
        f"{path}.experts has {layers} layers, expected at most {spec.num_layers - 1} of {spec.num_layers}: "
        "nothing is left to predict.",
        remedy="Move the finished token to the end of `context` and begin the next one with no experts.",
    )


def _wrong_experts(
    experts: list[int], layer: int, spec: RoutingSpec, request: PredictRequest, row: int
) -> RequestInvalid:
    field = f"{_path(request, row)}.experts[{layer}]"
    if len(experts) != spec.top_k:
        return RequestInvalid(
            f"{field} has {len(experts)} entries, expected top_k = {spec.top_k}.", remedy=SPEC_REMEDY
        )
    return RequestInvalid(
        f"{field} is {experts}: not all different.", remedy="A token is routed to top_k different experts."
    )


def _path(request: PredictRequest, row: int) -> str:
    """Where in the request the token of a row stands."""
    return next(path for number, path in enumerate(_paths(request)) if number == row)


def _paths(request: PredictRequest) -> Iterator[str]:
    for number, sequence in enumerate(request.sequences):
        yield from (f"sequences[{number}].context[{position}]" for position in range(len(sequence.context)))
        yield f"sequences[{number}]"
