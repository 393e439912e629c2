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
from jaxtyping import Bool, Float, Float32, Int16, Int64
from torch import Tensor

from traces.spec import RoutingSpec
from traces.trace import RoutingTrace


@dataclass(frozen=True)
class Batch:
    """Examples of B tokens of one or more blocks.

    routing: weight of each expert of each layer for this token, 0 where not routed.
    history: the same, averaged over earlier tokens of the sequence, one average for each decay.
    token_ids: ids of this token and of the tokens before it, -1 where unknown or before the start.
    targets: 1 where routed.
    """

    routing: Float[Tensor, "B L E"]
    history: Float[Tensor, "B S L E"]
    token_ids: Int64[Tensor, "B R"]
    targets: Float[Tensor, "B L E"]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def gate_weights(
    gates: Float[np.ndarray, "*N K"] | None, shape: Sequence[int]
) -> Float32[np.ndarray, "*N K"]:
    """How much each routed expert counts as an input: half for being routed, half by its share of the gates.

    1 on average over the top-k, and exactly 1 where gates are unknown. `shape` is that of the experts.
    """
    if gates is None:
        return np.ones(shape, np.float32)
    total = np.maximum(gates.sum(-1, keepdims=True), 1e-9)
    return (0.5 + 0.5 * shape[-1] * gates / total).astype(np.float32)


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
        # With gates and without: 0 and 1 of the first axis.
        variants = (False, True) if trace.gates is not None else (True,)
        self._start = np.stack([self._histories_at_start(uniform) for uniform in variants])

    def __len__(self) -> int:
        return len(self.first)

    def draw(self, blocks: Int64[np.ndarray, "N"], uniform_gates: Bool[np.ndarray, "N"]) -> Batch:
        """The tokens of these blocks, one block after another; with gates, or as if none were known."""
        tokens, inside = self._tokens(blocks), self.inside(blocks)
        routing = np.stack(
            [self._dense(row, bool(u)) for row, u in zip(tokens, uniform_gates, strict=True)]
        )  # N T LE
        start = self._start[np.where(uniform_gates, len(self._start) - 1, 0), blocks].astype(np.float32)
        fading = self.decays[:, None] ** np.arange(self.block_tokens, dtype=np.float32)  # S T
        history = np.einsum("stu,nuf->ntsf", self._inside, routing, optimize=True)
        history += fading.T[None, :, :, None] * start[:, None]
        layers, experts = self.spec.num_layers, self.spec.num_experts
        routing = routing[inside].reshape(-1, layers, experts)
        return Batch(
            routing=torch.from_numpy(routing),
            history=torch.from_numpy(history[inside].reshape(-1, len(self.decays), layers, experts)),
            token_ids=torch.from_numpy(self.token_ids[tokens[inside]]),
            targets=torch.from_numpy((routing > 0).astype(np.float32)),
        )

    def in_order(self, batch_blocks: int, *, uniform_gates: bool = False) -> Iterator[Batch]:
        """All tokens, in order, a few blocks at a time."""
        for start in range(0, len(self), batch_blocks):
            blocks = np.arange(start, min(start + batch_blocks, len(self)))
            yield self.draw(blocks, np.full(len(blocks), uniform_gates))

    def inside(self, blocks: Int64[np.ndarray, "N"]) -> Bool[np.ndarray, "N T"]:
        """Which token places of these blocks hold a token: a sequence's last block may be short."""
        return np.arange(self.block_tokens) < self.length[blocks][:, None]

    def _tokens(self, blocks: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N T"]:
        """Token numbers of each block; places past its end repeat its last."""
        steps = np.minimum(np.arange(self.block_tokens), self.length[blocks][:, None] - 1)
        return self.first[blocks][:, None] + steps

    def _dense(self, tokens: Int64[np.ndarray, "T"], uniform: bool) -> Float32[np.ndarray, "T LE"]:
        layers, experts = self.spec.num_layers, self.spec.num_experts
        routed = self.experts[tokens]
        gates = None if uniform or self.gates is None else self.gates[tokens]
        columns = (routed + np.arange(layers, dtype=np.int64)[:, None] * experts).reshape(len(tokens), -1)
        dense = np.zeros((len(tokens), layers * experts), np.float32)
        np.put_along_axis(dense, columns, gate_weights(gates, routed.shape).reshape(columns.shape), 1)
        return dense

    def _histories_at_start(self, uniform: bool) -> Float[np.ndarray, "N S LE"]:
        """Averages over all before each block: zero at a sequence's start, carried from block to block."""
        width = self.spec.num_layers * self.spec.num_experts
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
                carried = fade * carried + weight @ self._dense(tokens, uniform)
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
