"""The `multiscale` predictor: a trunk for each number of layers that tell of a token, joined one by one.

    y = trunk_2(tokens by their last 2 layers);  then for 3, and for 4 layers:
    y = norm(g y + (1 - g) h),   g = sigmoid(G [y, h]),   h = trunk of that scale

What is joined stays between its two parts, so that no scale can blow up what the others say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from traces.spec import RoutingSpec
from training.predictor_configs import MultiscaleConfig
from training.predictors.attention import Encoder, causal_mask
from training.predictors.window import WindowPredictor
from training.vocabulary import Vocabulary


class Join(nn.Module):
    """norm(g y + (1 - g) h), with g from both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, y: Float[Tensor, "*B D"], h: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The same shape."""
        share = torch.sigmoid(self.gate(torch.cat([y, h], -1)))
        return self.norm(h + share * (y - h))


class MultiscalePredictor(WindowPredictor):
    """A trunk for each context, and a join between each and the next."""

    def __init__(self, spec: RoutingSpec, config: MultiscaleConfig, vocabulary: Vocabulary) -> None:
        super().__init__(spec, config, vocabulary, config.contexts)
        self.trunks = nn.ModuleList(
            Encoder(config.width, config.heads, config.hidden, config.blocks, config.window, config.dropout)
            for _ in config.contexts
        )
        self.joins = nn.ModuleList(Join(config.width) for _ in config.contexts[1:])

    def read(
        self, embeddings: Sequence[Float[Tensor, "S W D"]], present: Bool[Tensor, "S W"], queries: int
    ) -> Float[Tensor, "S Q D"]:
        """What the last `queries` tokens of each window see."""
        mask = causal_mask(present)
        y, *wider = (trunk(x, mask, queries) for trunk, x in zip(self.trunks, embeddings, strict=True))
        for join, h in zip(self.joins, wider, strict=True):
            y = join(y, h)
        return y
