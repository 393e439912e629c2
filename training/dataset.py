"""Training examples from a routing trace: blocks of consecutive tokens, with the history each began with.

Comes after `traces`, before `loop`. A token's example is its routing with its gates; averages of the routing
of the tokens before it in its sequence, and of its own earlier places there; the ids of it and of the last
few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int16, Int64
from torch import Tensor

from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.augmentation import Change
from training.averages import Averages
from training.config import PrefixConfig
from training.examples import Examples
from training.repeats import place_weights, places, rank_weights, spread
from training.similar import Window, without_ids


@dataclass(frozen=True)
class Batch:
    """Examples of B tokens of one or more blocks.

    routing: by layer, in channel 0 a 1 for each routed expert, in channel 1 its `gate_offsets`; else 0.
    averages: over earlier tokens of the sequence, one for each decay, of what each routed expert weighed: K
    times its share of the gates, 1 where they are unknown.
    repeats: of the routing at earlier places of this token (`training.repeats`).
    window, alike, preceding: experts of the tokens before, newest first, what they have in common with this
    one, and how many experts the tokens before them share with those before this one, an average for each
    decay (`training.similar`); W is 0 where the predictor does not look at them.
    token_ids: ids of this token and of the tokens before it, -1 where unknown or before the start.
    """

    routing: Float[Tensor, "B L 2 E"]
    averages: Float[Tensor, "B S L E"]
    repeats: Float[Tensor, "B 2 L E"]
    window: Int[Tensor, "B W L K"]
    alike: Int[Tensor, "B W"]
    preceding: Float[Tensor, "B M W"]
    token_ids: Int64[Tensor, "B R"]

    @property
    def targets(self) -> Float[Tensor, "B L E"]:
        """1 where routed."""
        return self.routing[:, :, 0]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def hiding(self, history: Bool[Tensor, "B"], ids: Bool[Tensor, "B"]) -> Batch:
        """The same, some tokens as if their sequence began with them, some as if no token id were known."""
        return Batch(
            self.routing,
            self.averages * ~history[:, None, None, None],
            self.repeats * ~(history | ids)[:, None, None, None],
            self.window,
            without_ids(self.alike, ids) * ~history[:, None],
            self.preceding,
            self.token_ids.masked_fill(ids[:, None], -1),
        )

    def changed(self, change: Change) -> Batch:
        """The same, augmented, but for the targets. Of a mixture, the token ids are its own."""
        told = self.routing * ~change.dropped[:, :, None, None]
        return Batch(
            change.inputs(told.transpose(1, 2)).transpose(1, 2),
            change.inputs(self.averages),
            change.inputs(self.repeats),
            change.ids(self.window),
            without_ids(self.alike, change.permuted),
            self.preceding,
            self.token_ids.masked_fill(change.permuted[:, None], -1),
        )


TINY = 1e-9


def gate_offsets(gates: Float[np.ndarray, "*N K"]) -> Float32[np.ndarray, "*N K"]:
    """How much more than an equal share each routed expert weighs: K times its share, less 1.

    0 where all are equal, hence where gates are unknown. The scale of the gates does not matter.
    """
    share = gates / np.maximum(gates.sum(-1, keepdims=True), TINY)
    return (gates.shape[-1] * share - 1).astype(np.float32)


class Blocks(Examples[Batch]):
    """The blocks of a trace. Sequences are cut into blocks from their first token on; the last may be short.

    Every array is kept as the trace has it, but for the order of a token's experts, which is by falling gate;
    `draw` makes dense examples of a few blocks.
    """

    def __init__(self, trace: RoutingTrace, block_tokens: int, config: PrefixConfig) -> None:
        trace = by_gate(trace)
        self.spec: RoutingSpec = trace.spec
        self.block_tokens = block_tokens
        self.experts: Int16[np.ndarray, "N L K"] = trace.experts
        self.gates = trace.gates
        self.token_ids = recent_ids(trace, config.recent_tokens)
        self.first, self.length, begins = cut(trace.starts, block_tokens)
        self._ranks = rank_weights(self.spec.top_k)
        self._places = places(trace, config.window, config.repeats)
        self._place_weights = place_weights(config.repeats, config.repeat_decay)
        self._looks_back = Window(trace, config.window if config.similar else 0)
        self._routing_before = Averages(
            self, begins, config.decays, lambda tokens: self._weighed(tokens).flatten(-2)
        )
        # Who is among the most similar may hang on the last bits.
        self._shared_before = Averages(
            self, begins, config.preceding_decays, self._looks_back.shared, exact=True
        )

    def draw(self, blocks: Int64[np.ndarray, "N"], hide_gates: Bool[np.ndarray, "N"]) -> Batch:
        """The tokens of these blocks, one block after another; some as if no gates were known."""
        inside = self.inside(blocks)
        tokens = self.tokens(blocks)[inside]
        averages = self._routing_before.before(blocks)[inside]
        offsets = self._offsets(tokens)
        offsets[np.repeat(hide_gates, self.length[blocks])] = 0
        return Batch(
            routing=torch.stack([self._routed(tokens), torch.from_numpy(offsets)], 2),
            averages=averages.unflatten(-1, (self.spec.num_layers, self.spec.num_experts)),
            repeats=self._repeats(tokens),
            window=torch.from_numpy(self._looks_back.experts(tokens)),
            alike=torch.from_numpy(self._looks_back.alike(tokens)),
            preceding=self._shared_before.before(blocks)[inside],
            token_ids=torch.from_numpy(self.token_ids[tokens]),
        )

    def _repeats(self, tokens: Int64[np.ndarray, "N"]) -> Float[Tensor, "N 2 L E"]:
        earlier = self._places[tokens]
        weights = torch.from_numpy(earlier >= 0) * self._place_weights
        return spread(torch.from_numpy(self.experts[earlier]), weights, self._ranks, self.spec.num_experts)

    def _routed(self, tokens: Int64[np.ndarray, "*N"]) -> Float[Tensor, "*N L E"]:
        """1 for each routed expert of these tokens, else 0."""
        dense = torch.zeros(*tokens.shape, self.spec.num_layers, self.spec.num_experts)
        return dense.scatter_(-1, torch.from_numpy(self.experts[tokens].astype(np.int64)), 1.0)

    def _weighed(self, tokens: Int64[np.ndarray, "*N"]) -> Float[Tensor, "*N L E"]:
        """What each routed expert of these tokens weighs: K times its share of the gates, else 0."""
        experts = torch.from_numpy(self.experts[tokens].astype(np.int64))
        weights = torch.ones(experts.shape)
        if self.gates is not None:
            weights += torch.from_numpy(gate_offsets(self.gates[tokens]))
        dense = torch.zeros(*tokens.shape, self.spec.num_layers, self.spec.num_experts)
        return dense.scatter_(-1, experts, weights)

    def _offsets(self, tokens: Int64[np.ndarray, "N"]) -> Float32[np.ndarray, "N L E"]:
        """`gate_offsets` of each routed expert of these tokens, else 0."""
        dense = np.zeros((len(tokens), self.spec.num_layers, self.spec.num_experts), np.float32)
        if self.gates is not None:
            np.put_along_axis(
                dense, self.experts[tokens].astype(np.int64), gate_offsets(self.gates[tokens]), -1
            )
        return dense


def by_gate(trace: RoutingTrace) -> RoutingTrace:
    """The same, each token's experts by falling gate; where gates are unknown, as they were."""
    if trace.gates is None:
        return trace
    order = np.argsort(-trace.gates, -1, kind="stable")
    experts, gates = (np.take_along_axis(slots, order, -1) for slots in (trace.experts, trace.gates))
    return replace(trace, experts=experts, gates=gates)


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
