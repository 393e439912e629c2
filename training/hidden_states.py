"""Training examples with hidden states: beside each token's routing, what its routers were given.

Beside `dataset`, before `loop`. What a predictor is told of them is one: what the last router that ran was
given. With s layers of a token seen that is row s of `newest`; at its start, row 0, it is what the last
layer's router was given for the token before it.

trace with hidden states -> `HiddenExamples`, alone or with `Blocks` -> predictors.probes, .prefix_hidden
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64
from torch import Tensor

from traces.hidden import HiddenStates
from traces.trace import RoutingTrace
from training.augmentation import Change
from training.dataset import Batch, Blocks, cut
from training.errors import HiddenMissing
from training.examples import Examples
from training.predictor_configs import PrefixHiddenConfig


@dataclass(frozen=True)
class HiddenBatch:
    """Examples of B tokens. routed: 1 for each routed expert. newest: by layers seen; all 0 where untold."""

    routed: Float[Tensor, "B L E"]
    newest: Float16[Tensor, "B L+1 H"]

    @property
    def targets(self) -> Float[Tensor, "B L E"]:
        """1 where routed."""
        return self.routed

    @property
    def token_ids(self) -> Int64[Tensor, "B 2"]:
        """Ids are not used, so as if unknown."""
        return torch.full((len(self.routed), 2), -1, device=self.routed.device)

    def at(self, seen: Int64[Tensor, "B P"]) -> Float32[Tensor, "B P H"]:
        """What is told with so many layers seen."""
        return self.newest[torch.arange(len(seen), device=seen.device)[:, None], seen].float()

    def to(self, device: torch.device) -> HiddenBatch:
        """The same on another device."""
        return HiddenBatch(self.routed.to(device), self.newest.to(device))

    def hiding(self, history: Bool[Tensor, "B"], ids: Bool[Tensor, "B"]) -> HiddenBatch:
        """The same, some tokens as if their sequence began with them."""
        newest = self.newest.clone()
        newest[history, 0] = 0
        return replace(self, newest=newest)

    def changed(self, change: Change) -> HiddenBatch:
        """The same, augmented, but for the targets. Of permuted experts hidden states tell nothing."""
        told = torch.nn.functional.pad(~change.dropped, (1, 0), value=True) & ~change.permuted[:, None]
        return replace(self, newest=change.noisy(change.mixed(self.newest * told[..., None])))


def hidden_of(trace: RoutingTrace) -> HiddenStates:
    """The hidden states of a trace. Raises HiddenMissing where it has none."""
    if trace.hidden is None:
        raise HiddenMissing(
            f"The traces of {trace.spec.model} have no hidden states, and this predictor reads them.",
            remedy="Record all of them with specmoe collect --hidden, or choose another --predictor.",
        )
    return trace.hidden


def check_hidden(trace: RoutingTrace, *others: RoutingTrace) -> int:
    """The size of the hidden states of all these traces. Raises HiddenMissing where it is not one size."""
    size = hidden_of(trace).size
    for other in others:
        if (came := hidden_of(other).size) != size:
            raise HiddenMissing(
                f"Hidden states of {other.spec.model} have {came} numbers, expected {size} as in the training"
                " traces.",
                remedy="Record all traces from one model.",
            )
    return size


class HiddenExamples(Examples[HiddenBatch]):
    """The blocks of a trace with their hidden states. Raises HiddenMissing where the trace has none.

    hidden: all of them. told: whether they are drawn; else all are 0.
    """

    def __init__(self, trace: RoutingTrace, block_tokens: int, config: Any) -> None:
        self.spec, self.block_tokens, self.hidden = trace.spec, block_tokens, hidden_of(trace)
        self.told = True
        self._experts, self._starts = trace.experts, trace.starts
        self.first, self.length, _ = cut(trace.starts, block_tokens)

    def untold(self) -> Self:
        """The same as if no hidden state were known."""
        other = copy(self)
        other.told = False
        return other

    def draw(self, blocks: Int64[np.ndarray, "N"], hide_gates: Bool[np.ndarray, "N"]) -> HiddenBatch:
        """The tokens of these blocks, one block after another."""
        tokens = (self.first[blocks][:, None] + np.arange(self.block_tokens))[self.inside(blocks)]
        layers, size = self.spec.num_layers, self.hidden.size
        routed = torch.zeros(len(tokens), layers, self.spec.num_experts)
        routed.scatter_(-1, torch.from_numpy(self._experts[tokens].astype(np.int64)), 1.0)
        if not self.told:
            return HiddenBatch(routed, torch.zeros(len(tokens), layers + 1, size, dtype=torch.float16))
        newest = self.hidden.newest(self._starts, tokens[:, None], np.arange(layers + 1))
        return HiddenBatch(routed, torch.from_numpy(np.asarray(newest)))


@dataclass(frozen=True)
class PrefixHiddenBatch:
    """The same tokens as `prefix` reads them, and their hidden states."""

    prefix: Batch
    hidden: HiddenBatch

    @property
    def targets(self) -> Float[Tensor, "B L E"]:
        """1 where routed."""
        return self.prefix.targets

    @property
    def token_ids(self) -> Int64[Tensor, "B R"]:
        """Ids of this token and of those before it, -1 where unknown or before the start."""
        return self.prefix.token_ids

    def to(self, device: torch.device) -> PrefixHiddenBatch:
        """The same on another device."""
        return PrefixHiddenBatch(self.prefix.to(device), self.hidden.to(device))

    def hiding(self, history: Bool[Tensor, "B"], ids: Bool[Tensor, "B"]) -> PrefixHiddenBatch:
        """The same, some tokens without history, some without token ids."""
        return PrefixHiddenBatch(self.prefix.hiding(history, ids), self.hidden.hiding(history, ids))

    def changed(self, change: Change) -> PrefixHiddenBatch:
        """The same, augmented, but for the targets."""
        return PrefixHiddenBatch(self.prefix.changed(change), self.hidden.changed(change))


class PrefixHiddenExamples(Examples[PrefixHiddenBatch]):
    """The blocks of a trace for `prefix`, with their hidden states. Raises HiddenMissing."""

    def __init__(self, trace: RoutingTrace, block_tokens: int, config: PrefixHiddenConfig) -> None:
        self._hidden = HiddenExamples(trace, block_tokens, config)
        self._prefix = Blocks(trace, block_tokens, config.prefix)
        self.spec, self.block_tokens = trace.spec, block_tokens
        self.first, self.length = self._hidden.first, self._hidden.length

    def untold(self) -> Self:
        """The same as if no hidden state were known."""
        other = copy(self)
        other._hidden = self._hidden.untold()
        return other

    def draw(self, blocks: Int64[np.ndarray, "N"], hide_gates: Bool[np.ndarray, "N"]) -> PrefixHiddenBatch:
        """The tokens of these blocks, one block after another; some as if no gates were known."""
        return PrefixHiddenBatch(self._prefix.draw(blocks, hide_gates), self._hidden.draw(blocks, hide_gates))
