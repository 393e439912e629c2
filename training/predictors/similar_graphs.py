"""Looking for similar tokens (`training.similar`) as it is served: layer by layer, from a sequence's window.

Part of the graphs of `training.predictors.prefix_graphs`. `counted` is what the layers told add to how many
experts are shared; `routing` ranks the window by it, and adds up the best ones' routing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int32, Int64, UInt8
from torch import Tensor, nn

from traces.spec import RoutingSpec
from training.config import PrefixConfig
from training.similar import LEAST, NEVER


class Similar(nn.Module):
    """likeness: the predictor's weights, by layers seen. rise, fade: as those of `prefix_graphs.Step`."""

    def __init__(
        self,
        spec: RoutingSpec,
        config: PrefixConfig,
        likeness: Float[Tensor, "L+1 5"],
        rise: Float[Tensor, "L"],
        fade: Float[Tensor, "L+1 1"],
    ) -> None:
        super().__init__()
        self.spec, self.count = spec, config.similar
        plain, lately, of_id, of_pair, of_age = likeness.detach().unbind(1)
        # Of an expert shared: 1, and as much as if the middle layer were the last one; of no layer, nothing.
        of_layer = torch.stack([torch.ones_like(rise), rise], 1)
        self.of_layer = nn.Buffer(nn.functional.pad(of_layer, (0, 0, 1, 0)))
        self.of_shared = nn.Buffer(torch.stack([plain, lately * fade[:, 0]], 1)[:, None])
        never, nothing = torch.full_like(of_id, NEVER), torch.zeros_like(of_id)
        self.of_kind = nn.Buffer(torch.stack([never, nothing, of_id, of_id + of_pair], 1).view(-1, 1))
        ages = torch.arange(1, config.window + 1, dtype=torch.float32)
        self.of_age = nn.Buffer(of_age[:, None] * torch.log(ages))
        self.first = nn.Buffer(torch.arange(spec.num_layers)[:, None] * spec.num_experts)
        self.ones = nn.Buffer(torch.ones(spec.top_k, 1))

    def counted(
        self, rows: Int[Tensor, "B M W*K"], layers: Int32[Tensor, "B M"], experts: Int32[Tensor, "B M K"]
    ) -> Float[Tensor, "B 2 W"]:
        """How many experts of some layers each token of the window shares, in all and lately.

        rows: what the window was routed to in these layers. layers: -1 is none.
        """
        batch, told, _ = rows.shape
        chosen = self.ones.new_zeros((batch, told, self.spec.num_experts))
        chosen = chosen.scatter(2, experts.clamp(min=0).long(), 1.0)
        both = nn.functional.embedding(layers + 1, self.of_layer).mT @ chosen.gather(2, rows.long())
        return (both.unflatten(2, (-1, self.spec.top_k)) @ self.ones)[..., 0]

    def routing(
        self,
        routed: Int[Tensor, "B L W*K"],
        alike: UInt8[Tensor, "B W"],
        shared: Float[Tensor, "B 2 W"],
        seen: Int32[Tensor, "B"],
    ) -> Float[Tensor, "B 1 L E"]:
        """The map of the most similar tokens, before its root is taken."""
        spec = self.spec
        of_shared = (self.of_shared.index_select(0, seen) @ shared)[:, 0]
        kind = nn.functional.embedding((seen * 4)[:, None] + alike.int(), self.of_kind)[..., 0]
        score = of_shared + kind + self.of_age.index_select(0, seen)
        best, place = score.topk(self.count)
        share = nn.functional.pad(best, (0, 1)).softmax(-1)[:, :-1]
        target = at_places(routed, place, spec.top_k).long() + self.first  # B L J*K
        weight = share[:, None, :, None].expand(-1, spec.num_layers, -1, spec.top_k)
        empty = share.new_full((seen.shape[0], spec.num_layers * spec.num_experts), LEAST)
        spread = empty.scatter_add(1, target.flatten(1), weight.flatten(1))
        return spread.view(-1, 1, spec.num_layers, spec.num_experts)


def at_places(
    routed: Int[Tensor, "B L W*K"], place: Int64[Tensor, "B J"], top_k: int
) -> Int[Tensor, "B L J*K"]:
    """What the window's tokens at these places were routed to."""
    slots = (place[..., None] * top_k + torch.arange(top_k)).flatten(1)
    return routed.gather(2, slots[:, None].expand(-1, routed.shape[1], -1))


def alike(
    present: Int32[Tensor, "B"], same: Bool[Tensor, "B 2 W"] | None, window: int
) -> UInt8[Tensor, "B W"]:
    """What each token of the window has in common with this one.

    present: how many there are. same: whether of the same id, and after the same id; None: no ids are read.
    """
    there = (torch.arange(window) < present[:, None]).to(torch.uint8)
    return there if same is None else there + same[:, 0].to(torch.uint8) + same[:, 1].to(torch.uint8)
