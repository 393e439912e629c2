"""Training examples for attention: of each token the window of tokens that ends with it.

Beside `dataset`, before `loop`. A block's tokens are scored together in one pass: each sees those before it.
All windows that a block needs are one stretch of `window` tokens that ends with the block's, so a block of
`window` tokens is the cheapest, its first token sees nothing of the past, and one of a single token sees just
what is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from traces.trace import RoutingTrace
from training.augmentation import Change
from training.dataset import TINY, cut
from training.errors import ConfigInvalid
from training.examples import Examples


class Windowed(Protocol):
    """A config that says how many tokens a window has, the present one among them."""

    @property
    def window(self) -> int:
        """Tokens (count)."""


@dataclass(frozen=True)
class WindowBatch:
    """N blocks of T tokens, B tokens in all, each block with the tokens before it: stretches of W.

    weights: of every expert by layer, the routed ones' share of the gates, equal where unknown; else 0.
    present: which places of a stretch hold a token. inside: which of the last T do; those are scored.
    routed: 1 for each routed expert of those.
    """

    weights: Float[Tensor, "N W L E"]
    present: Bool[Tensor, "N W"]
    inside: Bool[Tensor, "N T"]
    routed: Float[Tensor, "B L E"]

    @property
    def targets(self) -> Float[Tensor, "B L E"]:
        """1 where routed."""
        return self.routed

    @property
    def token_ids(self) -> Int64[Tensor, "B 2"]:
        """Of each token and the one before it: ids are not used, so as if unknown."""
        return torch.full((len(self.routed), 2), -1, device=self.routed.device)

    @property
    def first(self) -> Int64[Tensor, "N"]:
        """Number of each block's first token among the B."""
        length = self.inside.sum(1)
        return length.cumsum(0) - length

    def to(self, device: torch.device) -> WindowBatch:
        """The same on another device."""
        return WindowBatch(*(tensor.to(device) for tensor in vars(self).values()))

    def hiding(self, history: Bool[Tensor, "B"], ids: Bool[Tensor, "B"]) -> WindowBatch:
        """The same: the first tokens of blocks have no history anyway."""
        return self

    def changed(self, change: Change) -> WindowBatch:
        """The same, augmented, but for the targets."""
        own = self.inside.shape[1]
        blocks = change.of_blocks(self.first)
        dropped = self.inside.new_zeros((*self.inside.shape, self.weights.shape[2]))
        dropped[self.inside] = change.dropped
        kept = torch.cat([self.weights[:, :-own], self.weights[:, -own:] * ~dropped[..., None]], 1)
        return WindowBatch(
            blocks.inputs(kept), self.present | self.present[blocks.partner], self.inside, self.routed
        )


class Windows(Examples[WindowBatch]):
    """The blocks of a trace, with their windows. Raises ConfigInvalid for blocks longer than a window."""

    shares_prefix = True

    def __init__(self, trace: RoutingTrace, block_tokens: int, config: Windowed) -> None:
        if block_tokens > config.window:
            raise ConfigInvalid(
                f"block_tokens is {block_tokens}, expected at most the window ({config.window} tokens).",
                remedy="Set --block-tokens or --window accordingly.",
            )
        self.spec, self.block_tokens, self.window = trace.spec, block_tokens, config.window
        self.experts, self.gates = trace.experts, trace.gates
        self.first, self.length, _ = cut(trace.starts, block_tokens)
        sequence = np.searchsorted(trace.starts, self.first, side="right") - 1
        self._begin = trace.starts[sequence]

    def draw(self, blocks: Int64[np.ndarray, "N"], hide_gates: Bool[np.ndarray, "N"]) -> WindowBatch:
        """The tokens of these blocks, one block after another; some as if no gates were known."""
        inside = self.inside(blocks)
        end = self.first[blocks] + self.length[blocks]
        tokens = self.first[blocks][:, None] + np.arange(self.block_tokens - self.window, self.block_tokens)
        present = (tokens >= self._begin[blocks][:, None]) & (tokens < end[:, None])
        tokens = np.where(present, tokens, end[:, None] - 1)
        experts = self.experts[tokens].astype(np.int64)  # N W L K
        shares = self._shares(tokens)
        shares[hide_gates] = 1 / self.spec.top_k
        shares *= present[:, :, None, None]
        empty = torch.zeros(*tokens.shape, self.spec.num_layers, self.spec.num_experts)
        routed = torch.zeros(int(inside.sum()), *empty.shape[2:])
        own = torch.from_numpy(experts[:, -self.block_tokens :][inside])
        return WindowBatch(
            weights=empty.scatter_(-1, torch.from_numpy(experts), torch.from_numpy(shares)),
            present=torch.from_numpy(present),
            inside=torch.from_numpy(inside),
            routed=routed.scatter_(-1, own, 1.0),
        )

    def _shares(self, tokens: Int64[np.ndarray, "N W"]) -> Float32[np.ndarray, "N W L K"]:
        """Of each routed expert in its layer's gates; equal where unknown."""
        if self.gates is None:
            shape = (*tokens.shape, self.spec.num_layers, self.spec.top_k)
            return np.full(shape, 1 / self.spec.top_k, np.float32)
        gates = self.gates[tokens].astype(np.float32)
        return gates / np.maximum(gates.sum(-1, keepdims=True), TINY)
