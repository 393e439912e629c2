"""Made-up routing with hidden states that know what comes: embeddings of the experts of the layers behind
them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.training.toy_routing import SPEC, toy_trace
from traces.hidden import HiddenStates, write_routers
from traces.parquet import TraceWriter
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace

SIZE = 24


def with_hidden(trace: RoutingTrace, *, routers: bool = True) -> RoutingTrace:
    """The same with hidden states: of each layer, what its router and all later ones pick, and noise."""
    spec, rng = trace.spec, np.random.default_rng(5)
    gates = rng.normal(size=(spec.num_layers, spec.num_experts, SIZE + 1)).astype(np.float32)
    gates[..., -1] = 0
    gates *= 2 / np.sqrt(SIZE)
    picked = gates[np.arange(spec.num_layers)[:, None], trace.experts][..., :-1].sum(2)  # N L H
    coming = picked[:, ::-1].cumsum(1)[:, ::-1]
    states = coming + 0.5 * np.random.default_rng(trace.num_tokens).normal(size=coming.shape)
    return replace(trace, hidden=HiddenStates(states.astype(np.float16), gates if routers else None))


def toy_hidden_trace(
    lengths: tuple[int, ...] = (17, 1, 30, 9), *, spec: RoutingSpec = SPEC, seed: int = 0
) -> RoutingTrace:
    return with_hidden(toy_trace(lengths, spec=spec, seed=seed))


def save_shards(trace: RoutingTrace, folder: Path) -> Path:
    """Write a trace with its hidden states, as `specmoe collect --hidden` does."""
    hidden = trace.hidden
    with TraceWriter(
        folder,
        trace.spec,
        gates=trace.gates is not None,
        token_ids=trace.token_ids is not None,
        provenance={"source": "made up"},
        hidden_size=0 if hidden is None else hidden.size,
    ) as writer:
        writer.append(trace, None if hidden is None else hidden.states)
    if hidden is not None and hidden.routers is not None:
        write_routers(folder, hidden.routers)
    return folder
