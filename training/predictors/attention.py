"""Attention over the tokens of a window, each seeing itself and those before it.

Pre-norm transformer layers (Xiong et al. 2020): every layer begins as the identity, so that a deep trunk
trains with large steps. Where a token stands is told by what attention adds for each distance between two
tokens (Raffel et al. 2020), the same wherever a window begins.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from training.dropout import dropout
from training.predictors.prefix import Residual

# Added to the scores of what must not be seen; exp of it is 0.
NOT_SEEN = -1e4


class AttentionLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), of the last `queries` tokens of each window."""

    def __init__(self, width: int, heads: int, hidden: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.by_distance = nn.Parameter(torch.zeros(heads, window))
        tokens = torch.arange(window)
        distance = (tokens[:, None] - tokens).clamp(min=0)
        self.distance = nn.Buffer(distance, persistent=False)
        self.feed_forward = Residual(width, hidden, dropout)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, x: Float[Tensor, "S W D"], mask: Float[Tensor, "S 1 W W"], queries: int
    ) -> Float[Tensor, "S Q D"]:
        """mask: 0 where a token (row) may see another, else very negative."""
        normed = self.norm(x)
        query = self._by_head(self.query(normed[:, -queries:]))  # S H Q C
        key, value = self._by_head(self.key(normed)), self._by_head(self.value(normed))
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        scores = scores + self.by_distance[:, self.distance[-queries:]] + mask[:, :, -queries:]
        said = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)  # S Q D
        y = x[:, -queries:] + dropout(self.out(said), self.dropout, self.training)
        after: Tensor = self.feed_forward(y)
        return after

    def _by_head(self, x: Float[Tensor, "S W D"]) -> Float[Tensor, "S H W C"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Encoder(nn.Module):
    """Attention layers and a last norm. The last layer is worked out for the tokens asked for alone."""

    def __init__(self, width: int, heads: int, hidden: int, blocks: int, window: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            AttentionLayer(width, heads, hidden, window, dropout) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x: Float[Tensor, "S W D"], mask: Float[Tensor, "S 1 W W"], queries: int
    ) -> Float[Tensor, "S Q D"]:
        """Of the last `queries` tokens of each window."""
        *earlier, last = self.layers
        for layer in earlier:
            x = layer(x, mask, x.shape[1])
        return self.norm(last(x, mask, queries))


class Memory(nn.Module):
    """Patterns met in training, as keys and values that are learnt: y + what attention to them reads."""

    def __init__(self, width: int, patterns: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.keys = nn.Parameter(torch.randn(patterns, width) / math.sqrt(width))
        self.values = nn.Parameter(torch.zeros(patterns, width))

    def forward(self, y: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The same shape."""
        return y + (self.query(y) @ self.keys.T).softmax(-1) @ self.values


def causal_mask(present: Bool[Tensor, "S W"]) -> Float[Tensor, "S 1 W W"]:
    """A token sees itself and every one before it that is present."""
    window = present.shape[1]
    tokens = torch.arange(window, device=present.device)
    itself, earlier = tokens[:, None] == tokens, tokens[:, None] > tokens
    seen = itself | (earlier & present[:, None])
    return torch.where(seen, 0.0, NOT_SEEN)[:, None]
