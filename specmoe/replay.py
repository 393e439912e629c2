"""A recorded trace played as a model server would live it: ask, prefetch, route, layer by layer.

RoutingTrace + something that answers -> Replay -> recall by distance, and two simulated expert caches, one
without and one with forecasts. Knows no service: `specmoe.commands.replay` brings the answers.

specmoe replay test.npz --model gpt-oss-20b
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Integer

from specmoe.errors import ReplayError
from specmoe.expert_cache import ExpertCache
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace

# (token, first token of its sequence, layers seen) -> experts of the layers from there on, best first, a
# shorter row of coverage sets ending in -1; None where no answer came.
Ask = Callable[[int, int, int], Integer[np.ndarray, "M n"] | None]


class RecallTally:
    """Share of the routed experts among the first k and 2k forecast ones, by distance; "start" apart."""

    def __init__(self, spec: RoutingSpec) -> None:
        self._spec = spec
        # Row 0: token start; row d: layers d ahead of the last one seen. Columns: found in k, in 2k, routed.
        self._counts = np.zeros((spec.num_layers, 3), np.int64)

    def add(self, seen: int, ranking: Integer[np.ndarray, "M n"], routed: Integer[np.ndarray, "M K"]) -> None:
        """A forecast made after `seen` layers, and what the router did. n must be 2K at least, or E."""
        top_k = self._spec.top_k
        found = (ranking[:, :, None] == routed[:, None, :]).any(axis=-1)  # [M, n]
        rows = np.stack(
            [found[:, :top_k].sum(1), found[:, : 2 * top_k].sum(1), np.full(len(found), top_k)], 1
        )
        if seen == 0:
            self._counts[0] += rows.sum(0)
        else:
            self._counts[1 : len(rows) + 1] += rows

    def report(self) -> dict[str, dict[str, float]]:
        """By distance "start", "1", ...: `recall_at_k`, `recall_at_2k`, `experts` (routed ones counted)."""
        names = ["start", *map(str, range(1, len(self._counts)))]
        return {
            name: {"recall_at_k": in_k / routed, "recall_at_2k": in_2k / routed, "experts": routed}
            for name, (in_k, in_2k, routed) in zip(names, self._counts.tolist(), strict=True)
            if routed
        }


class CoverageTally:
    """How often the sets that came held all routed experts, and how large they were, by distance."""

    def __init__(self, spec: RoutingSpec) -> None:
        # Rows as in RecallTally. Columns: layers covered, experts in sets, layers.
        self._counts = np.zeros((spec.num_layers, 3), np.int64)

    def add(self, seen: int, sets: Integer[np.ndarray, "M n"], routed: Integer[np.ndarray, "M K"]) -> None:
        """Sets made after `seen` layers, and what the router did."""
        covered = (sets[:, :, None] == routed[:, None, :]).any(axis=1).all(axis=1)  # [M]
        rows = np.stack([covered, np.count_nonzero(sets >= 0, axis=1), np.ones(len(sets), np.int64)], 1)
        if seen == 0:
            self._counts[0] += rows.sum(0)
        else:
            self._counts[1 : len(rows) + 1] += rows

    def report(self) -> dict[str, dict[str, float]]:
        """By distance "start", "1", ..., and "all": `covered`, `mean_set_size`, `layers` (counted)."""
        names = ["start", *map(str, range(1, len(self._counts))), "all"]
        counts = [*self._counts.tolist(), self._counts.sum(0).tolist()]
        return {
            name: {"covered": covered / layers, "mean_set_size": size / layers, "layers": layers}
            for name, (covered, size, layers) in zip(names, counts, strict=True)
            if layers
        }


class Replay:
    """The state of a replay: what was asked, forecast, routed and resident up to now.

    every: ask again after so many layers; 0: at token start only. prefetch: experts a layer to fetch ahead;
    None: those of the coverage sets that come.
    cache_share: share of all experts that is resident. A forecast is fetched for the layers up to the next
    question, which will know more. Raises ReplayError where the cache cannot hold the experts of one layer,
    or a layer has fewer experts than are to be fetched.
    """

    def __init__(
        self, trace: RoutingTrace, ask: Ask, *, every: int, prefetch: int | None, cache_share: float
    ) -> None:
        spec = trace.spec
        if prefetch is not None and prefetch > spec.num_experts:
            raise ReplayError(
                f"{prefetch} experts of a layer are to be fetched ahead, but it has {spec.num_experts}.",
                remedy="Give a smaller --top-n.",
            )
        self.trace, self._ask, self._prefetch = trace, ask, prefetch
        self.questions = [0, *range(every, spec.num_layers, every)] if every else [0]
        self.recall, self.coverage = RecallTally(spec), CoverageTally(spec)
        self.tokens = 0
        capacity = cache_capacity(spec, cache_share)
        self.lru, self.ahead = ExpertCache(capacity), ExpertCache(capacity)

    def play(self, token: int, start: int) -> None:
        """One token, whose sequence begins at token `start`: layers are routed, questions come in between."""
        experts = self.trace.experts[token]  # [L, K]
        for seen, until in pairwise([*self.questions, len(experts)]):
            ranking = self._ask(token, start, seen)
            if ranking is not None:
                tally = self.coverage if self._prefetch is None else self.recall
                tally.add(seen, ranking, experts[seen:])
                ahead = ranking[: until - seen, : self._prefetch]
                wanted = [row[row >= 0].tolist() for row in ahead]
                self.ahead.prefetch(zip(range(seen, until), wanted, strict=True))
            for layer in range(seen, until):
                routed = experts[layer].tolist()
                self.lru.use(layer, routed)
                self.ahead.use(layer, routed)
        self.tokens += 1

    def report(self) -> dict[str, Any]:
        """Numbers up to now, fit for JSON."""
        caches = {"lru": self.lru, "lru_and_forecast": self.ahead}
        return {
            "tokens": self.tokens,
            "questions_after_layers": self.questions,
            "recall": self.recall.report(),
            "coverage": self.coverage.report(),
            "cache": {
                "experts_resident": self.lru.capacity,
                "experts": self.trace.spec.num_layers * self.trace.spec.num_experts,
                **{name: cache_report(cache) for name, cache in caches.items()},
            },
        }


def cache_capacity(spec: RoutingSpec, share: float) -> int:
    """Experts that `share` of all layers' experts is. Raises ReplayError where it is out of range."""
    if not 0 < share <= 1:
        raise ReplayError(
            f"The cache share is {share}, expected above 0, up to 1.", remedy="Give --cache-share 0.25."
        )
    capacity = round(share * spec.num_layers * spec.num_experts)
    if capacity < spec.top_k:
        raise ReplayError(
            f"A cache share of {share} is {capacity} experts, but one layer needs {spec.top_k}.",
            remedy="Give a larger --cache-share.",
        )
    return capacity


def cache_report(cache: ExpertCache) -> dict[str, float]:
    """What a cache did, fit for JSON."""
    return {
        "hit_rate": cache.hit_rate,
        "uses": cache.uses,
        "fetched_on_demand": cache.misses,
        "fetched_ahead": cache.fetched_ahead,
        "fetched_ahead_used": cache.useful,
        "fetched_ahead_wasted": cache.wasted,
    }
