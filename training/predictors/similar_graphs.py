"""Looking for similar tokens (`training.similar`) as it is served: layer by layer, from a sequence's window.

Part of the graphs of `training.predictors.prefix_graphs`. `counted` is what the layers told add to how many
experts are shared; `routing` ranks the window by it, and adds up the best ones' routing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional

from traces.spec import RoutingSpec
from training.config import PrefixConfig
from training.operators import looked_up
from training.similar import LEAST, NEVER


class Similar(nn.Module):
    """likeness, ranks: the predictor's weights, by layers seen and by rank. rise, fade: as those of
    `prefix_graphs.Step`."""

    def __init__(
        self,
        spec: RoutingSpec,
        config: PrefixConfig,
        likeness: Float[Tensor, "L+1 5+M"],
        ranks: Float[Tensor, "K"],
        rise: Float[Tensor, "L"],
        fade: Float[Tensor, "L+1 1"],
    ) -> None:
        super().__init__()
        self.spec, self.count = spec, config.similar
        plain, lately, of_id, of_pair, of_age, *of_preceding = likeness.detach().unbind(1)
        # Of an expert shared: 1, and as much as if the middle layer were the last one; of no layer, nothing.
        of_layer = torch.stack([torch.ones_like(rise), rise], 1)
        self.of_layer = nn.Buffer(functional.pad(of_layer, (0, 0, 1, 0)))
        self.of_shared = nn.Buffer(torch.stack([plain, lately * fade[:, 0], *of_preceding], 1)[:, None])
        never, nothing = torch.full_like(of_id, NEVER), torch.zeros_like(of_id)
        self.of_kind = nn.Buffer(torch.stack([never, nothing, of_id, of_id + of_pair], 1).flatten())
        ages = torch.arange(1, config.window + 1, dtype=torch.float32)
        self.of_age = nn.Buffer(of_age[:, None] * torch.log(ages))
        self.first = nn.Buffer(torch.arange(spec.num_layers)[:, None] * spec.num_experts)
        self.ones = nn.Buffer(torch.ones(spec.top_k, 1))
        self.ranks = nn.Buffer(ranks.detach())

    def counted(
        self, rows: Int[Tensor, "B M W*K"], layers: Int32[Tensor, "B M"], experts: Int32[Tensor, "B M K"]
    ) -> Float[Tensor, "B 2 W"]:
        """How many experts of some layers each token of the window shares, in all and lately.

        rows: what the window was routed to in these layers. layers: -1 is none.
        """
        both = functional.embedding(layers + 1, self.of_layer).mT @ chosen_there(rows, experts)
        return (both.unflatten(2, (-1, self.spec.top_k)) @ self.ones)[..., 0]

    def routing(
        self,
        routed: Int[Tensor, "B L W*K"],
        alike: Int[Tensor, "B W"],
        preceding: Float[Tensor, "B M W"],
        shared: Float[Tensor, "B 2 W"],
        seen: Int32[Tensor, "B"],
    ) -> Float[Tensor, "B 1 L E"]:
        """The map of the most similar tokens, before its root is taken."""
        spec = self.spec
        shared = torch.cat([shared, preceding], 1)
        of_shared = (self.of_shared.index_select(0, seen) @ shared)[:, 0]
        kind = looked_up(self.of_kind, (seen * 4)[:, None] + alike.int())
        score = of_shared + kind + self.of_age.index_select(0, seen)
        best, place = score.topk(self.count)
        share = functional.pad(best, (0, 1)).softmax(-1)[:, :-1]
        target = at_places(routed, place, spec.top_k).long() + self.first  # B L J*K
        weight = (share[..., None] * self.ranks)[:, None].expand(-1, spec.num_layers, -1, -1)
        empty = share.new_full((seen.shape[0], spec.num_layers * spec.num_experts), LEAST)
        spread = empty.scatter_add(1, target.flatten(1), weight.flatten(1))
        return spread.view(-1, 1, spec.num_layers, spec.num_experts)


class Preceding(nn.Module):
    """What `Similar` is told of a finished token: how many experts its window shares with it, on average."""

    def __init__(self, spec: RoutingSpec, config: PrefixConfig) -> None:
        super().__init__()
        decays = torch.tensor(config.preceding_decays)[:, None]
        self.keep, self.take = nn.Buffer(decays), nn.Buffer(1 - decays)
        self.of_layer, self.of_slot = map(
            nn.Buffer, (torch.ones(1, spec.num_layers), torch.ones(spec.top_k, 1))
        )
        self.ages = nn.Buffer(torch.arange(config.window))
        self.spec = spec

    def forward(
        self,
        preceding: Float[Tensor, "B M W"],
        routed: Int[Tensor, "B L W*K"],
        past: Int32[Tensor, "B"],
        experts: Int32[Tensor, "B L K"],
    ) -> Float[Tensor, "B M W"]:
        """Averages for the next token. routed, past: of the token that is finished.

        Its neighbour at a place of the window and the next token's at the same place are as far apart.
        """
        both = self.of_layer @ chosen_there(routed, experts)
        shared = (both.unflatten(2, (-1, self.spec.top_k)) @ self.of_slot)[..., 0]
        return self.keep * preceding + self.take * (shared * (self.ages < past[:, None])[:, None])


def chosen_there(rows: Int[Tensor, "B M W*K"], experts: Int32[Tensor, "B M K"]) -> Float[Tensor, "B M W*K"]:
    """1 where what the window was routed to in some layers is among the experts of this token, else 0.

    Of a layer not seen it means nothing: -1 is an expert's id in bytes.
    """
    first, *others = experts.to(rows.dtype).split(1, -1)
    chosen = rows == first
    for other in others:
        chosen = chosen | (rows == other)
    return chosen.float()


def at_places(
    routed: Int[Tensor, "B L W*K"], place: Int64[Tensor, "B *J"], top_k: int
) -> Int[Tensor, "B L J*K"]:
    """What the window's tokens at these places were routed to."""
    slots = torch.arange(routed.shape[2]).view(-1, top_k)
    slots = functional.embedding(place, slots).view(place.shape[0], 1, -1)
    return routed.gather(2, slots.expand(-1, routed.shape[1], -1))


def alike(
    present: Int32[Tensor, "B"], same: Bool[Tensor, "B 2 W"] | None, window: int
) -> Int32[Tensor, "B W"]:
    """What each token of the window has in common with this one.

    present: how many there are. same: whether of the same id, and after the same id; None: no ids are read.
    """
    there = (torch.arange(window) < present[:, None]).int()
    return there if same is None else there + same.int().sum(1, dtype=torch.int32)
