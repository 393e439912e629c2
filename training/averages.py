"""Averages over the tokens before each one in its sequence, kept at the start of each block of tokens.

What is averaged is a row of numbers a token: its routing, or how alike it is to others (`training.dataset`,
`training.similar`). Inside a block averages are computed when it is drawn, so that memory grows with tokens /
block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from training.examples import Examples


class Averages:
    """One average for each decay, as if sequences had begun with zeros. Decay 0: of the token before alone.

    begins: which blocks begin their sequence. rows: of tokens [..], their numbers [.., F].
    exact: kept in 32 bits at the start of a block instead of 16.
    """

    def __init__(
        self,
        blocks: Examples[Any],
        begins: Bool[np.ndarray, "N"],
        decays: tuple[float, ...],
        rows: Callable[[Int64[np.ndarray, "*N"]], Float[Tensor, "*N F"]],
        *,
        exact: bool = False,
    ) -> None:
        self._blocks, self._rows, self._exact = blocks, rows, exact
        self._decays = np.asarray(decays, np.float32)
        self._inside = torch.from_numpy(_kernel(self._decays, blocks.block_tokens))
        self._at_start = self._carried_along(begins)

    def before(self, blocks: Int64[np.ndarray, "N"]) -> Float[Tensor, "N T S F"]:
        """For each token of these blocks: what was carried to the block's start, fading, and the block's own
        earlier tokens."""
        # By torch: numpy's threads would go on spinning beside it.
        rows = self._rows(self._blocks.tokens(blocks))
        fading = self._decays[:, None] ** np.arange(self._blocks.block_tokens, dtype=np.float32)
        carried = torch.from_numpy(self._at_start[blocks]).float()
        inside = torch.einsum("stu,nuf->ntsf", self._inside, rows)
        return inside.addcmul_(torch.from_numpy(fading).T[None, :, :, None], carried[:, None])

    def _carried_along(self, begins: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "N S F"]:
        """Averages over all before each block: zero at a sequence's start, carried from block to block."""
        blocks, tokens = self._blocks, self._blocks.block_tokens
        decays = self._decays[:, None]
        weight = (1 - decays) * decays ** np.arange(tokens - 1, -1, -1, dtype=np.float32)
        fade = decays**tokens
        width = self._rows(blocks.first[:1]).shape[-1]
        starts = np.zeros((len(blocks), len(decays), width), np.float32 if self._exact else np.float16)
        carried = np.zeros((len(decays), width), np.float32)
        for block in range(len(blocks)):
            if begins[block]:
                carried = np.zeros_like(carried)
            starts[block] = carried
            if blocks.length[block] == tokens:  # a short block is its sequence's last
                first = blocks.first[block]
                carried = fade * carried + weight @ self._rows(np.arange(first, first + tokens)).numpy()
        return starts


def _kernel(decays: Float32[np.ndarray, "S"], tokens: int) -> Float32[np.ndarray, "S T T"]:
    """`kernel[s, t, u]`: weight of token u in the average of scale s just before token t of its block."""
    gap = np.arange(tokens)[:, None] - np.arange(tokens)[None, :] - 1
    powers = (1 - decays)[:, None, None] * decays[:, None, None] ** np.maximum(gap, 0)
    return np.where(gap >= 0, powers, 0).astype(np.float32)
