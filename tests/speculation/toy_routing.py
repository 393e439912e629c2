"""Routing that obeys the contract, made up from a seed: for tests that hold for any routing."""

from __future__ import annotations

import numpy as np

from traces.spec import RoutingSpec


def routed(
    seed: int, batch: int, spec: RoutingSpec, seen: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token_ids [B], experts [B, L, K], gates [B, L, K]). seen: layers known; None: by chance."""
    rng = np.random.default_rng(seed)
    shape = (batch, spec.num_layers, spec.num_experts)
    experts = rng.random(shape).argsort(axis=-1)[..., : spec.top_k].astype(np.int32)
    known = rng.integers(0, spec.num_layers + 1, batch) if seen is None else np.full(batch, seen)
    experts[np.arange(spec.num_layers) >= known[:, None]] = -1
    gates = rng.uniform(0.1, 2.0, experts.shape).astype(np.float32)
    return rng.integers(-1, 5000, batch), experts, gates
