"""Training examples from a routing trace: blocks of consecutive tokens, with the history each began with.

Comes after `traces`, before `loop`. A token's example is its routing, weighted by gate; averages of the
routing of the tokens before it in its sequence; the ids of it and of the last few tokens. The averages at
the start of each block are computed once, those inside a block when it is drawn, so that memory grows with
tokens / block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int16, Int64
from torch import Tensor

from traces.spec import RoutingSpec
from traces.trace import RoutingTrace

# A share below it says no more than "almost nothing".
MIN_SHARE = 1e-3
TINY = 1e-9


@dataclass(frozen=True)
class Batch:
    """Examples of B tokens of one or more blocks.

    routing: by layer, in channel 0 a 1 for each routed expert, in channel 1 its `gate_offsets`; else 0.
    history: the same, averaged over earlier tokens of the sequence, one average for each decay.
    token_ids: ids of this token and of the tokens before it, -1 where unknown or before the start.
    targets: 1 where routed.
    """

    routing: Float[Tensor, "B L 2 E"]
    history: Float[Tensor, "B S L 2 E"]
    token_ids: Int64[Tensor, "B R"]
    targets: Float[Tensor, "B L E"]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def gate_offsets(gates: Float[np.ndarray, "*N K"]) -> Float32[np.ndarray, "*N K"]:
    """How far each routed expert's weight is above the others, in nats: log share less its mean.

    0 where all are equal, hence where gates are unknown. A router makes it linear in the hidden state.
    """
    share = gates / np.maximum(gates.sum(-1, keepdims=True), TINY)
    logs = np.log(np.maximum(share, MIN_SHARE))
    return (logs - logs.mean(-1, keepdims=True)).astype(np.float32)


class Blocks:
    """The blocks of a trace. Sequences are cut into blocks from their first token on; the last may be short.

    Every array is kept as the trace has it; `draw` makes dense examples of a few blocks.
    """

    def __init__(
        self, trace: RoutingTrace, decays: Sequence[float], block_tokens: int, recent_tokens: int
    ) -> None:
        self.spec: RoutingSpec = trace.spec
        self.block_tokens = block_tokens
        self.decays = np.asarray(decays, np.float32)
        self.experts: Int16[np.ndarray, "N L K"] = trace.experts
        self.gates = trace.gates
        self.token_ids = recent_ids(trace, recent_tokens)
        self.first, self.length, self._begins = cut(trace.starts, block_tokens)
        self._inside = decay_kernel(self.decays, block_tokens)
        self._start = self._histories_at_start()

    def __len__(self) -> int:
        return len(self.first)

    def draw(self, blocks: Int64[np.ndarray, "N"], hide_gates: Bool[np.ndarray, "N"]) -> Batch:
        """The tokens of these blocks, one block after another; some as if no gates were known."""
        tokens, inside = self._tokens(blocks), self.inside(blocks)
        routing = self._dense(tokens)  # N T F
        fading = self.decays[:, None] ** np.arange(self.block_tokens, dtype=np.float32)  # S T
        history = self._inside_averages(routing)
        history += fading.T[None, :, :, None] * self._start[blocks].astype(np.float32)[:, None]
        routing = routing[inside].reshape(-1, self.spec.num_layers, 2, self.spec.num_experts)
        history = history[inside].reshape(-1, len(self.decays), *routing.shape[1:])
        hidden = np.repeat(hide_gates, self.length[blocks])
        routing[hidden, :, 1] = 0
        history[hidden, :, :, 1] = 0
        return Batch(
            routing=torch.from_numpy(routing),
            history=torch.from_numpy(history),
            token_ids=torch.from_numpy(self.token_ids[tokens[inside]]),
            targets=torch.from_numpy(routing[:, :, 0].copy()),
        )

    def _inside_averages(self, routing: Float32[np.ndarray, "N T F"]) -> Float32[np.ndarray, "N T S F"]:
        # By torch: numpy's threads would go on spinning beside it.
        averages = torch.einsum("stu,nuf->ntsf", torch.from_numpy(self._inside), torch.from_numpy(routing))
        return averages.numpy()

    def in_order(self, tokens: int) -> Iterator[Batch]:
        """All tokens, in order, about so many at a time."""
        at_once = max(1, tokens // self.block_tokens)
        for start in range(0, len(self), at_once):
            blocks = np.arange(start, min(start + at_once, len(self)))
            yield self.draw(blocks, np.zeros(len(blocks), bool))

    def inside(self, blocks: Int64[np.ndarray, "N"]) -> Bool[np.ndarray, "N T"]:
        """Which token places of these blocks hold a token: a sequence's last block may be short."""
        return np.arange(self.block_tokens) < self.length[blocks][:, None]

    def _tokens(self, blocks: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N T"]:
        """Token numbers of each block; places past its end repeat its last."""
        steps = np.minimum(np.arange(self.block_tokens), self.length[blocks][:, None] - 1)
        return self.first[blocks][:, None] + steps

    def _dense(self, tokens: Int64[np.ndarray, "*N"]) -> Float32[np.ndarray, "*N F"]:
        """Features of these tokens, F = L x 2 x E."""
        spec = self.spec
        dense = np.zeros((*tokens.shape, spec.num_layers, 2, spec.num_experts), np.float32)
        routed = self.experts[tokens].astype(np.int64)
        np.put_along_axis(dense[..., 0, :], routed, 1.0, -1)
        if self.gates is not None:
            np.put_along_axis(dense[..., 1, :], routed, gate_offsets(self.gates[tokens]), -1)
        return dense.reshape(*tokens.shape, -1)

    def _histories_at_start(self) -> Float16[np.ndarray, "N S F"]:
        """Averages over all before each block: zero at a sequence's start, carried from block to block."""
        width = self.spec.num_layers * 2 * self.spec.num_experts
        starts = np.zeros((len(self), len(self.decays), width), np.float16)
        carried = np.zeros((len(self.decays), width), np.float32)
        decays = self.decays[:, None]
        weight = (1 - decays) * decays ** np.arange(self.block_tokens - 1, -1, -1, dtype=np.float32)
        fade = decays**self.block_tokens
        for block in range(len(self)):
            if self._begins[block]:
                carried = np.zeros_like(carried)
            starts[block] = carried
            if self.length[block] == self.block_tokens:  # a short block is its sequence's last
                tokens = np.arange(self.first[block], self.first[block] + self.block_tokens)
                carried = fade * carried + weight @ self._dense(tokens)
        return starts


def cut(
    starts: Int64[np.ndarray, "S+1"], block_tokens: int
) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Where each block of each sequence begins, its length in tokens, and whether it begins its sequence."""
    lengths = np.diff(starts)
    counts = -(-lengths // block_tokens)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[sequence] + within * block_tokens
    return first, np.minimum(block_tokens, starts[sequence + 1] - first), within == 0


def decay_kernel(decays: Float32[np.ndarray, "S"], tokens: int) -> Float32[np.ndarray, "S T T"]:
    """`kernel[s, t, u]`: weight of token u in the average of scale s just before token t of its block."""
    gap = np.arange(tokens)[:, None] - np.arange(tokens)[None, :] - 1
    powers = (1 - decays)[:, None, None] * decays[:, None, None] ** np.maximum(gap, 0)
    return np.where(gap >= 0, powers, 0).astype(np.float32)


def recent_ids(trace: RoutingTrace, recent: int) -> Int64[np.ndarray, "N R+1"]:
    """The id of each token and of the `recent` tokens before it in its sequence; -1 where there is none."""
    ids = np.full((trace.num_tokens, recent + 1), -1, np.int64)
    if trace.token_ids is None:
        return ids
    position = np.arange(trace.num_tokens) - np.repeat(trace.starts[:-1], np.diff(trace.starts))
    for back in range(recent + 1):
        reaches = position >= back
        ids[reaches, back] = trace.token_ids[np.flatnonzero(reaches) - back]
    return ids
