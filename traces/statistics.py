"""How uneven and how sticky routing is, layer by layer: what a trace tells before anything is learned.

specmoe traces info recording.npz
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

from traces.trace import ENTRIES_AT_ONCE, RoutingTrace


def usage(trace: RoutingTrace) -> Int64[np.ndarray, "L E"]:
    """How many tokens each layer routed to each expert."""
    experts = trace.spec.num_experts
    counts = [np.bincount(layer.ravel(), minlength=experts) for layer in trace.experts.swapaxes(0, 1)]
    return np.stack(counts)


def usage_entropy(trace: RoutingTrace) -> Float64[np.ndarray, "L"]:
    """Entropy of each layer's expert usage as a share of the greatest possible, log E.

    1: all experts are used equally often, and popularity tells nothing; 0: always the same one.
    """
    shares = usage(trace) / (trace.num_tokens * trace.spec.top_k)
    logarithms = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    entropy: Float64[np.ndarray, "L"] = -(shares * logarithms).sum(axis=1) / np.log(trace.spec.num_experts)
    return entropy


def temporal_locality(trace: RoutingTrace) -> Float64[np.ndarray, "L"] | None:
    """Share of each layer's routed experts that it also routed the previous token of the sequence to.

    None where no sequence has two tokens. A uniformly random router has K / E.
    """
    later = np.ones(trace.num_tokens, dtype=bool)
    later[trace.starts[:-1]] = False
    rows = np.flatnonzero(later)
    if not len(rows):
        return None
    layers, top_k = trace.spec.num_layers, trace.spec.top_k
    at_once = max(1, ENTRIES_AT_ONCE // (layers * top_k * top_k))
    again = np.zeros(layers)
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        same = trace.experts[part][..., :, None] == trace.experts[part - 1][..., None, :]  # n L K K
        again += same.any(axis=-1).sum(axis=(0, 2))
    return again / (len(rows) * top_k)
