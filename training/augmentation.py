"""Examples changed at random, for any predictor: experts permuted, layers dropped, tokens mixed, noise.

plan -> draw_change -> Batch.changed, and Change.targets -> loss. Off unless asked for (`TrainConfig`); never
on the validation split.

Experts have identities: expert 5 of a layer has its own weights, and its number means the same in every
sequence. A permutation within each layer takes that away from a block, inputs and targets alike, so what can
be learnt from it is only what holds whoever the experts are: that the past repeats. Token ids say nothing
about permuted experts and are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from traces.spec import RoutingSpec
from training.config import TrainConfig


@dataclass(frozen=True)
class Change:
    """What is done to B tokens. Permutation and mixing are the same for all tokens of a block.

    experts: the expert whose place each takes, by layer. permuted: tokens whose experts change places.
    dropped: layers as if nothing had been told of them.
    partner: the token each is mixed with, of another block of the same length, or itself. own: how much
    of the mixture is its own (0.5 to 1).
    noise: standard deviation of the factor, 1 on average, of every weight of the inputs.
    """

    experts: Int64[Tensor, "B L E"]
    permuted: Bool[Tensor, "B"]
    dropped: Bool[Tensor, "B L"]
    partner: Int64[Tensor, "B"]
    own: Float[Tensor, "B"]
    noise: float

    def targets(self, routed: Float[Tensor, "B L E"]) -> Float[Tensor, "B L E"]:
        """The share of each expert in what is to be forecast; K in all for each layer."""
        return self.mixed(routed.gather(-1, self.experts))

    def inputs(self, maps: Float[Tensor, "B Q L E"]) -> Float[Tensor, "B Q L E"]:
        """Q maps of earlier or present routing."""
        permuted = maps.gather(-1, self.experts[:, None].expand_as(maps))
        return self.noisy(self.mixed(permuted))

    def ids(self, experts: Int[Tensor, "B W L K"]) -> Int[Tensor, "B W L K"]:
        """Ids of experts that were routed to. Tokens that are mixed keep their own."""
        places = self.experts.argsort(-1)[:, None].expand(-1, experts.shape[1], -1, -1)
        return places.gather(-1, experts.long()).to(experts.dtype)

    def mixed(self, x: Float[Tensor, "B *N"]) -> Float[Tensor, "B *N"]:
        """Each token with its partner (Zhang et al. 2018, mixup)."""
        own = self.own.view(-1, *[1] * (x.ndim - 1))
        return x * own + x[self.partner] * (1 - own)

    def noisy(self, x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Every weight times a normal number around 1; what is 0 stays 0."""
        return x * (1 + self.noise * torch.randn_like(x)) if self.noise else x

    def of_blocks(self, first: Int64[Tensor, "N"]) -> Change:
        """The same with a row for each block. first: number of its first token among the B."""
        block = torch.full_like(self.partner, -1)
        block[first] = torch.arange(len(first))
        return Change(
            self.experts[first],
            self.permuted[first],
            self.dropped[first],
            block[self.partner[first]],
            self.own[first],
            self.noise,
        )


def draw_change(config: TrainConfig, spec: RoutingSpec, length: Int64[Tensor, "N"]) -> Change | None:
    """A change for the tokens of blocks of these lengths, by torch's generator; None where all is off."""
    if not (config.permute_experts or config.drop_layers or config.mixup or config.noise):
        return None
    blocks, layers, experts = len(length), spec.num_layers, spec.num_experts
    block = torch.arange(blocks).repeat_interleave(length)
    as_they_are = torch.arange(experts).expand(blocks, layers, experts)
    permuted = torch.rand(blocks) < config.permute_experts
    shuffled = torch.rand(blocks, layers, experts).argsort(-1)
    partner, own = _partners(config.mixup, length)
    first = length.cumsum(0) - length
    return Change(
        experts=torch.where(permuted[:, None, None], shuffled, as_they_are)[block],
        permuted=permuted[block],
        dropped=torch.rand(len(block), layers) < config.drop_layers,
        partner=torch.arange(len(block)) + (first[partner] - first)[block],
        own=own[block],
        noise=config.noise,
    )


def _partners(
    concentration: float, length: Int64[Tensor, "N"]
) -> tuple[Int64[Tensor, "N"], Float[Tensor, "N"]]:
    """For each block one of the same length, and the share that it keeps."""
    itself = torch.arange(len(length))
    if not concentration:
        return itself, torch.ones(len(length))
    other = torch.randperm(len(length))
    drawn = torch.distributions.Beta(concentration, concentration).sample((len(length),))
    return torch.where(length[other] == length, other, itself), torch.maximum(drawn, 1 - drawn)
