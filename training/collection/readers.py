"""Reads expert ids and gates off what a router returns: one way for nearly all, a table for the others.

`training.collection.routers` finds the routers, `training.collection.recorder` calls their readers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Routed(NamedTuple):
    """Where a router sends its tokens. experts: logical ids; gates: as the model weighs the experts by."""

    experts: Int[Tensor, "*tokens K"]
    gates: Float[Tensor, "*tokens K"]
    num_experts: int


# A module, what it was given and what it returned -> where its tokens go; None where it is no router.
Reader = Callable[[nn.Module, tuple[Any, ...], Any], Routed | None]


def read_triple(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Routed | None:
    """`(logits, gates, ids, ...)`, as nearly all routers of transformers return it."""
    if not isinstance(output, tuple) or not all(isinstance(part, Tensor) for part in output[:3]):
        return None
    if len(output) < 3 or output[2].dtype not in (torch.int64, torch.int32):
        return None
    logits, gates, experts = output[:3]
    if not gates.is_floating_point() or gates.shape != experts.shape or gates.ndim < 2:
        return None
    return Routed(experts, gates, logits.shape[-1])


def _switch(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Routed:
    """`(one-hot expert within capacity, its probability, logits)`; beyond capacity counts as routed, too."""
    _, probability, logits = output
    return Routed(logits.argmax(-1, keepdim=True), probability, logits.shape[-1])


def _nllb(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Routed:
    """`(mask of the first expert, gates of all experts, logits)`, at most two gates of a token above 0.

    A token that no expert takes (capacity, padding) counts as routed to the two that the router liked best.
    """
    _, weights, logits = output
    experts = logits.topk(2, dim=-1).indices
    gates, liking = weights.gather(-1, experts), logits.softmax(-1).gather(-1, experts)
    left_out = gates.sum(-1, keepdim=True) == 0
    return Routed(
        experts,
        torch.where(left_out, (liking / liking.sum(-1, keepdim=True)).to(gates.dtype), gates),
        logits.shape[-1],
    )


def _jetmoe(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Routed:
    """`(..., logits)`: what comes before is sorted by expert, no longer by token."""
    logits = output[-1]
    top, experts = logits.topk(module.top_k, dim=-1)
    return Routed(experts, top.softmax(-1), logits.shape[-1])


def _llama4(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Routed:
    """`(gates of all experts, logits)`: gates are 0 but for the top-k."""
    weights, logits = output
    experts = logits.topk(module.top_k, dim=-1).indices
    return Routed(experts, weights.gather(-1, experts), logits.shape[-1])


def _dbrx(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Routed:
    """The experts' own module, given `(hidden states, ids, gates)`: the layer around it does the routing."""
    _, experts, gates = arguments
    num_experts: Any = module.num_experts
    return Routed(experts, gates, num_experts)


# By the class of the module.
READERS: Mapping[str, Reader] = {
    "SwitchTransformersTop1Router": _switch,
    "NllbMoeTop2Router": _nllb,
    "JetMoeTopKGating": _jetmoe,
    "Llama4Router": _llama4,
    "DbrxExperts": _dbrx,
}
