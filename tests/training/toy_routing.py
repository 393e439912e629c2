"""Made-up routing with structure to find: topics that last, layers that follow, experts that are popular."""

from __future__ import annotations

import numpy as np

from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, starts_of

SPEC = RoutingSpec(model="toy", num_layers=4, num_experts=8, top_k=2)


def toy_trace(
    lengths: tuple[int, ...] = (17, 1, 30, 9),
    *,
    spec: RoutingSpec = SPEC,
    seed: int = 0,
    gates: bool = True,
    token_ids: bool = True,
) -> RoutingTrace:
    """Each token has a topic, often the last one; from it, with noise, follow the experts of every layer."""
    rng = np.random.default_rng(seed)
    tokens, layers, experts, top_k = sum(lengths), spec.num_layers, spec.num_experts, spec.top_k
    topics = rng.integers(0, experts, tokens)
    for token in range(1, tokens):
        if rng.random() < 0.5:
            topics[token] = topics[token - 1]
    # The same tables for every seed, so that what is learnt from one trace holds for another.
    liking = np.random.default_rng(99).normal(size=(layers, experts, experts)) * 2
    popularity = np.random.default_rng(98).normal(size=(layers, experts))
    logits = liking[:, topics].transpose(1, 0, 2) + popularity + rng.gumbel(size=(tokens, layers, experts))
    order = np.argsort(-logits, axis=-1)[..., :top_k]
    weights = np.exp(np.take_along_axis(logits, order, axis=-1))
    return RoutingTrace(
        spec=spec,
        experts=order.astype(np.int16),
        gates=(weights / weights.sum(-1, keepdims=True)).astype(np.float32) if gates else None,
        token_ids=topics.astype(np.int32) if token_ids else None,
        starts=starts_of(lengths),
        domains=tuple("maths" if i % 2 else "prose" for i in range(len(lengths))),
    )
