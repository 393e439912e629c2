"""The training loss: how far forecasts are from the routed sets of experts, over layers not seen yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from traces.spec import RoutingSpec

# What an expert that is routed to counts among the others: as good as nothing, but not the logarithm of 0.
TINY = 1e-9
# How many layers after the last one seen count more: what a server has time to fetch is among them.
NEAREST = 4
# What the level of the logits counts beside their ranking: enough to fix it.
LEVEL = 0.1


def unseen(seen: Int64[Tensor, "B P"], num_layers: int) -> Float[Tensor, "B P L"]:
    """1 for every layer that comes after the first `seen` ones, else 0."""
    layer = torch.arange(num_layers, device=seen.device)
    return (layer >= seen[..., None]).float()


def weighted(seen: Int64[Tensor, "B P"], num_layers: int, near: float) -> Float[Tensor, "B P L"]:
    """What each layer counts in training: as `unseen`; once layers were seen, the next four 1 + near times.

    At token start, all alike.
    """
    ahead = torch.arange(num_layers, device=seen.device) - seen[..., None]
    told = (seen > 0)[..., None]
    return (ahead >= 0) * (1 + near * told * (ahead < NEAREST))


def weighted_next(num_layers: int, near: float, prefixes: int) -> Float[Tensor, "A L"]:
    """What `weighted` adds for near, of each layer 0 to A - 1 layers before its turn.

    For every prefix, so much that it comes to the same as for so many drawn ones beside the empty one.
    """
    ahead = torch.arange(min(NEAREST, num_layers))[:, None]
    told = torch.arange(num_layers) - ahead > 0
    return near * told * ((prefixes - 1) / num_layers)


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
    """Sum over unseen layers of how badly the routed set is ranked and, at a tenth, how wrong probabilities
    are, in nats per routed expert.

    Two terms on the same logits. By one, each routed expert is to be ahead of those that are not routed: the
    cross-entropy of the softmax over it and them. (A softmax over all experts would have the routed ones
    compete with each other, too.) The sigmoid one fixes the level, so that a logit is that of a probability.
    An expert that is routed to in part, in a mixture, is in part among the others.
    Divide by `weight.sum()` for the mean. Answers of several predictors, along M, are added up.
    """
    routed = targets[:, None]
    others = torch.logsumexp(logits + torch.log((1 - routed).clamp(min=TINY)), -1, keepdim=True)
    behind = (functional.softplus(others - logits) * routed).sum(-1)
    sigmoid = functional.binary_cross_entropy_with_logits(logits, routed.expand_as(logits), reduction="none")
    return ((behind + LEVEL * sigmoid.sum(-1)) / routed.sum(-1) * weight).sum()
