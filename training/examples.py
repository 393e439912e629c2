"""What every kind of training examples has in common: sequences cut into blocks, drawn by number.

routing trace -> Examples: `Blocks`, `Windows` or `Joint`, as the predictor reads them -> `training.loop`
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from traces.spec import RoutingSpec
from training.augmentation import Change


class Batch(Protocol):
    """Examples of B tokens of one or more blocks."""

    @property
    def targets(self) -> Float[Tensor, "B L E"]:
        """1 where routed."""

    @property
    def token_ids(self) -> Int64[Tensor, "B R"]:
        """Ids of this token and of some before it, -1 where unknown."""

    def to(self, device: torch.device) -> Self:
        """The same on another device."""

    def hiding(self, history: Bool[Tensor, "B"], ids: Bool[Tensor, "B"]) -> Self:
        """The same, some tokens as if their sequence began with them, some as if no token id were known."""

    def changed(self, change: Change) -> Self:
        """The same, augmented, but for the targets (`Change.targets`)."""


AnyBatch = TypeVar("AnyBatch", bound=Batch, covariant=True)


class Examples(ABC, Generic[AnyBatch]):
    """The blocks of a trace.

    first, length: of each block, its first token's number and how many tokens it has: the last of a sequence
    may be short. shares_prefix: the tokens of a block are all asked with the same layers seen, and what a
    token sees of its past is what is served in blocks of one token only.
    """

    shares_prefix: ClassVar[bool] = False
    spec: RoutingSpec
    block_tokens: int
    first: Int64[np.ndarray, "N"]
    length: Int64[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.first)

    @abstractmethod
    def draw(self, blocks: Int64[np.ndarray, "N"], hide_gates: Bool[np.ndarray, "N"]) -> AnyBatch:
        """The tokens of these blocks, one block after another; some as if no gates were known."""

    def in_order(self, tokens: int) -> Iterator[AnyBatch]:
        """All tokens, in order, about so many at a time."""
        at_once = max(1, tokens // self.block_tokens)
        for start in range(0, len(self), at_once):
            blocks = np.arange(start, min(start + at_once, len(self)))
            yield self.draw(blocks, np.zeros(len(blocks), bool))

    def untold(self) -> Self:
        """The same as if no hidden state were known; those that have none as they are."""
        return self

    def tokens(self, blocks: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N T"]:
        """Token numbers of each block; places past its end repeat its last."""
        steps = np.minimum(np.arange(self.block_tokens), self.length[blocks][:, None] - 1)
        return self.first[blocks][:, None] + steps

    def inside(self, blocks: Int64[np.ndarray, "N"]) -> Bool[np.ndarray, "N T"]:
        """Which token places of these blocks hold a token."""
        return np.arange(self.block_tokens) < self.length[blocks][:, None]
