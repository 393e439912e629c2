"""The training loss: how far predicted sets of experts are from the routed ones, over layers not seen yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from traces.spec import RoutingSpec

# Layers over which the weight of the next one falls by a factor of e, and how many of them weigh more at all.
NEAR, NEAREST = 3.0, 4


def unseen(seen: Int64[Tensor, "B P"], num_layers: int) -> Float[Tensor, "B P L"]:
    """1 for every layer that comes after the first `seen` ones, else 0."""
    layer = torch.arange(num_layers, device=seen.device)
    return (layer >= seen[..., None]).float()


def weighted(seen: Int64[Tensor, "B P"], num_layers: int, near: float) -> Float[Tensor, "B P L"]:
    """What each layer counts in training: as `unseen`; once layers were seen, the next one 1 + near times.

    The further ahead, the less of it. At token start, all alike.
    """
    ahead = torch.arange(num_layers, device=seen.device) - seen[..., None]
    told = (seen > 0)[..., None]
    more = near * told * (ahead < NEAREST) * torch.exp(-ahead.clamp(min=0) / NEAR)
    return (ahead >= 0) * (1 + more)


def weighted_next(num_layers: int, near: float, prefixes: int) -> Float[Tensor, "A L"]:
    """What `weighted` adds for near, of each layer 0 to A - 1 layers before its turn.

    For every prefix, so much that it comes to the same as for so many drawn ones beside the empty one.
    """
    ahead = torch.arange(min(NEAREST, num_layers))[:, None]
    told = torch.arange(num_layers) - ahead > 0
    return near * told * torch.exp(-ahead / NEAR) * ((prefixes - 1) / num_layers)


def loss_of(spec: RoutingSpec) -> Callable[..., Tensor]:
    """`top_one_loss` where a layer has one routed expert, else `set_loss`."""
    return top_one_loss if spec.top_k == 1 else set_loss


def top_one_loss(
    logits: Float[Tensor, "*M B P L E"], targets: Float[Tensor, "B L E"], weight: Float[Tensor, "B P L"]
) -> Float[Tensor, ""]:
    """The same where a layer has one routed expert: the cross-entropy of the softmax, in nats.

    A distribution over the experts has its level, so that nothing else need fix it (`calibration.log_odds`).
    """
    softmax = -(targets[:, None] * functional.log_softmax(logits, -1)).sum(-1)
    return (softmax * weight).sum()


def set_loss(
    logits: Float[Tensor, "*M B P L E"], targets: Float[Tensor, "B L E"], weight: Float[Tensor, "B P L"]
) -> Float[Tensor, ""]:
    """Sum over unseen layers of the cross-entropy to the routed set, in nats per routed expert.

    Two terms on the same logits. The softmax one compares with 1/K on each routed expert, which is what
    ranking needs; the sigmoid one fixes the level, so that a logit is that of a probability. Divide by
    `weight.sum()` for the mean. Answers of several predictors, along M, are added up.
    """
    routed = targets[:, None].expand_as(logits)
    top_k = routed.sum(-1)
    softmax = -(routed * functional.log_softmax(logits, -1)).sum(-1) / top_k
    sigmoid = functional.binary_cross_entropy_with_logits(logits, routed, reduction="none").sum(-1) / top_k
    return ((softmax + sigmoid) * weight).sum()
