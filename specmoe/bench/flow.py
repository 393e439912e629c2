"""What a decode loop says on a stream, again and again: made-up tokens, layer by layer, as frames.

A *turn* is what is sent between two forecasts: the routing of one layer or, at token start, the last layer of
the token before and the start of the next. A token of L layers has L turns, and each brings a forecast.

    specmoe bench --only stream
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Self

from model_store.manifest import Manifest
from specmoe.bench import stream_frames as frames
from specmoe.bench.model_time import INPUTS
from specmoe.bench.routing import Routing, made_up
from traces.spec import RoutingSpec


@dataclass(frozen=True)
class Flow:
    """Which model, and how many sequences in one frame; fit for JSON as it stands."""

    model: str
    version: int
    num_layers: int
    num_experts: int
    top_k: int
    sequences: int

    @classmethod
    def of(cls, manifest: Manifest, sequences: int) -> Self:
        """Of a version."""
        spec = manifest.spec
        shape = spec.num_layers, spec.num_experts, spec.top_k
        return cls(spec.model, manifest.version, *shape, sequences)

    @property
    def spec(self) -> RoutingSpec:
        """The model's shape."""
        return RoutingSpec(self.model, self.num_layers, self.num_experts, self.top_k)


@functools.cache
def tokens(spec: RoutingSpec, sequences: int) -> tuple[Routing, ...]:
    """The tokens of a flow, all layers known: after the last one comes the first."""
    return tuple(made_up(spec, batch=sequences, seen=spec.num_layers, seed=seed) for seed in range(INPUTS))


@functools.cache
def turns(flow: Flow) -> tuple[bytes, ...]:
    """What is sent, turn by turn: of each token the start, then its layers but the last."""
    told: list[bytes] = []
    for number, token in enumerate(tokens(flow.spec, flow.sequences)):
        before = tokens(flow.spec, flow.sequences)[number - 1]
        last = _layers(flow, before, flow.num_layers - 1, flow.num_layers)
        told.append(last + _start(flow, token))
        told += [_layers(flow, token, layer, layer + 1) for layer in range(flow.num_layers - 1)]
    return tuple(told)


def opening(flow: Flow, token: int) -> bytes:
    """What is sent before the turns of a token: greeting, and the token before it up to its last layer."""
    sequences = range(flow.sequences)
    before = tokens(flow.spec, flow.sequences)[token - 1]
    known = (
        frames.masked(frames.hello(flow.model, flow.version)),
        frames.masked(frames.open_sequences(sequences)),
    )
    return b"".join(known) + _start(flow, before) + _layers(flow, before, 0, flow.num_layers - 1)


def _start(flow: Flow, token: Routing) -> bytes:
    return frames.masked(frames.start(range(flow.sequences), token.token_ids))


def _layers(flow: Flow, token: Routing, first: int, end: int) -> bytes:
    experts, gates = token.experts[:, first:end], token.gates[:, first:end]
    return frames.masked(frames.routing(range(flow.sequences), first, experts, gates, flow.num_experts))
