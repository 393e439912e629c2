"""Looking for similar tokens (`training.similar`) as it is served: layer by layer, from a sequence's window.

Part of the graphs of `training.predictors.prefix_graphs`. `counted` is what the layers told add to how many
experts are shared; `routing` ranks the window by it, and adds up the best ones' routing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int32, UInt8
from torch import Tensor, nn

from traces.spec import RoutingSpec
from training.config import PrefixConfig
from training.operators import rows_at
from training.similar import NEVER


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
        layer = torch.arange(spec.num_layers).repeat_interleave(spec.top_k)
        self.first = nn.Buffer(layer * spec.num_experts)  # L*K
        # Of an expert shared: 1, and as much as if the middle layer were the last one.
        self.by_slot = nn.Buffer(torch.stack([torch.ones(len(layer)), rise[layer]], 1))
        self.of_shared = nn.Buffer(torch.stack([plain, lately * fade[:, 0]], 1))
        never, nothing = torch.full_like(of_id, NEVER), torch.zeros_like(of_id)
        self.of_kind = nn.Buffer(torch.stack([never, nothing, of_id, of_id + of_pair], 1).view(-1, 1))
        ages = torch.arange(1, config.window + 1, dtype=torch.float32)
        self.of_age = nn.Buffer(of_age[:, None] * torch.log(ages))

    def counted(
        self, routed: Int[Tensor, "B W L*K"], layers: Int32[Tensor, "B M"], experts: Int32[Tensor, "B M K"]
    ) -> Float[Tensor, "B W 2"]:
        """How many experts of these layers each token of the window shares, in all and lately."""
        spec = self.spec
        at = (layers[..., None] * spec.num_experts + experts).clamp(min=0).long()
        told = (layers >= 0).float()[..., None].expand(-1, -1, spec.top_k)
        empty = told.new_zeros((layers.shape[0], spec.num_layers * spec.num_experts))
        chosen = empty.scatter_add(1, at.flatten(1), told.flatten(1))
        places = (routed.long() + self.first).flatten(1)
        return chosen.gather(1, places).view(-1, routed.shape[1], len(self.first)) @ self.by_slot

    def routing(
        self,
        routed: Int[Tensor, "B W L*K"],
        alike: UInt8[Tensor, "B W"],
        shared: Float[Tensor, "B W 2"],
        seen: Int32[Tensor, "B"],
    ) -> Float[Tensor, "B 1 L E"]:
        """The map of the most similar tokens."""
        spec = self.spec
        of_shared = (shared @ self.of_shared.index_select(0, seen)[..., None])[..., 0]
        kind = nn.functional.embedding((seen * 4)[:, None] + alike.int(), self.of_kind)[..., 0]
        score = of_shared + kind + self.of_age.index_select(0, seen)
        best, place = score.topk(self.count)
        share = nn.functional.pad(best, (0, 1)).softmax(-1)[:, :-1]
        target = rows_at(routed, place).long() + self.first  # B J L*K
        weight = share[..., None].expand(-1, -1, len(self.first))
        empty = share.new_zeros((seen.shape[0], spec.num_layers * spec.num_experts))
        spread = empty.scatter_add(1, target.flatten(1), weight.flatten(1))
        return spread.view(-1, 1, spec.num_layers, spec.num_experts)


def alike(
    present: Int32[Tensor, "B"], same: Bool[Tensor, "B 2 W"] | None, window: int
) -> UInt8[Tensor, "B W"]:
    """What each token of the window has in common with this one.

    present: how many there are. same: whether of the same id, and after the same id; None: no ids are read.
    """
    there = (torch.arange(window) < present[:, None]).to(torch.uint8)
    return there if same is None else there + same[:, 0].to(torch.uint8) + same[:, 1].to(torch.uint8)
