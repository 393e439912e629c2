"""A cache of expert weights, simulated: which experts stay resident where only demand fetches any.

Recorded routing + a policy -> simulate -> hits. A policy says what each resident expert is worth keeping; who
is worth least goes when room is needed. Fetches take no time here, and the cache starts empty.

    specmoe evaluate gpt-oss-20b --traces test.npz --cache
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Float64, Int64

from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.errors import EvaluationError

# Past it, weights that grow with the tokens are scaled down before they leave float64.
LARGEST_WEIGHT = 1e200
# Nothing is worth less: where it is not resident, nobody can be evicted.
ABSENT = np.inf

Worth = Float[np.ndarray, "F"]


class Policy(Protocol):
    """What an expert is worth keeping. Pair l * E + e is expert e of layer l; there are F = L * E."""

    def begin(self, token: int) -> None:
        """The trace's token number `token` begins: nothing of its routing is known."""

    def use(self, token: int, layer: int, pairs: Int64[np.ndarray, "K"]) -> None:
        """Its layer `layer` is routed to these."""

    def worth(self) -> Worth:
        """Of every pair now; among the resident ones, the lowest goes first."""


@dataclass(frozen=True)
class CacheCount:
    """uses: experts that tokens were routed to. hits: those that were resident when their layer began."""

    uses: int
    hits: int

    @property
    def misses(self) -> int:
        """Experts fetched, while their layer waited."""
        return self.uses - self.hits

    @property
    def hit_rate(self) -> float:
        """Share of the uses that needed no fetch; 0 where nothing was used."""
        return self.hits / self.uses if self.uses else 0.0


def capacity_of(spec: RoutingSpec, share: float) -> int:
    """Experts that `share` of all layers' experts is. Raises EvaluationError where a layer's K do not fit."""
    capacity = round(share * spec.num_layers * spec.num_experts)
    if not 0 < share <= 1 or capacity < spec.top_k:
        raise EvaluationError(
            f"A cache share of {share} is {capacity} of {spec.num_layers * spec.num_experts} experts,"
            f" expected {spec.top_k} at least and all at most.",
            remedy="Give a share above 0, up to 1, that holds the experts of one layer.",
        )
    return capacity


def simulate(trace: RoutingTrace, policy: Policy, capacity: int, *, by_layer: bool = False) -> CacheCount:
    """Play the trace through a cache that holds `capacity` experts.

    A layer's experts are all needed at the same time: none of them is evicted for another.
    by_layer: each layer has room of its own, capacity / L experts; else all layers share it.
    Raises EvaluationError where a layer's K experts do not fit.
    """
    spec = trace.spec
    experts = spec.num_experts
    room = capacity // spec.num_layers if by_layer else capacity
    if room < spec.top_k:
        raise EvaluationError(
            f"The cache has room for {room} experts, a layer needs {spec.top_k}.",
            remedy="Give a larger cache.",
        )
    pairs = pairs_of(trace)
    resident = np.zeros(spec.num_layers * experts, bool)
    held = np.zeros(spec.num_layers if by_layer else 1, np.int64)
    hits = 0
    for token in range(trace.num_tokens):
        policy.begin(token)
        for layer in range(spec.num_layers):
            used = pairs[token, layer]
            found = resident[used]
            hit = int(np.count_nonzero(found))
            hits += hit
            policy.use(token, layer, used)
            if hit == spec.top_k:
                continue
            pool, number = (slice(layer * experts, (layer + 1) * experts), layer) if by_layer else (_ALL, 0)
            missing = spec.top_k - hit
            resident[used] = False  # needed now: not among those that may go
            excess = int(held[number]) + missing - room
            if excess > 0:
                worth = np.where(resident[pool], policy.worth()[pool], ABSENT)
                resident[pool][_lowest(worth, excess)] = False
            resident[used] = True
            held[number] = min(held[number] + missing, room)
    return CacheCount(uses=int(pairs.size), hits=hits)


_ALL = slice(None)


def pairs_of(trace: RoutingTrace) -> Int64[np.ndarray, "N L K"]:
    """The pairs that each layer of each token is routed to."""
    first = np.arange(trace.spec.num_layers)[:, None] * trace.spec.num_experts
    pairs: Int64[np.ndarray, "N L K"] = trace.experts.astype(np.int64) + first
    return pairs


def next_uses(pairs: Int64[np.ndarray, "N L K"]) -> Int64[np.ndarray, "N L K"]:
    """The token of each pair's next use; N where there is none. A pair's layer is always the same."""
    tokens = len(pairs)
    flat = pairs.ravel()
    order = np.argsort(flat, kind="stable")  # by pair, then by time
    token = order // (flat.size // tokens)
    following = np.full(flat.size, tokens)
    same = flat[order][1:] == flat[order][:-1]
    following[order[:-1][same]] = token[1:][same]
    return following.reshape(pairs.shape)


def _lowest(worth: Worth, count: int) -> Int64[np.ndarray, "count"]:
    return np.asarray(worth.argmin())[None] if count == 1 else worth.argpartition(count - 1)[:count]


class LeastRecent:
    """LRU: what was used last is worth most."""

    def __init__(self, spec: RoutingSpec) -> None:
        self._last: Float64[np.ndarray, "F"] = np.zeros(spec.num_layers * spec.num_experts)
        self._clock = 0

    def begin(self, token: int) -> None:
        """Nothing changes."""

    def use(self, token: int, layer: int, pairs: Int64[np.ndarray, "K"]) -> None:
        self._clock += 1
        self._last[pairs] = self._clock

    def worth(self) -> Worth:
        return self._last


class DecayedFrequency:
    """LFU whose counts fade by `decay` a token; 1 is plain LFU."""

    def __init__(self, spec: RoutingSpec, decay: float = 1.0) -> None:
        self._counts: Float64[np.ndarray, "F"] = np.zeros(spec.num_layers * spec.num_experts)
        self._growth, self._weight = 1 / decay, 1.0

    def begin(self, token: int) -> None:
        """New uses weigh more, which comes to the same as old ones weighing less."""
        self._weight *= self._growth
        if self._weight > LARGEST_WEIGHT:
            self._counts /= self._weight
            self._weight = 1.0

    def use(self, token: int, layer: int, pairs: Int64[np.ndarray, "K"]) -> None:
        self._counts[pairs] += self._weight

    def worth(self) -> Worth:
        return self._counts


class Clairvoyant:
    """Knows the future: what is used again last is worth least. No demand-fetching cache has more hits.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal
    5(2), 1966; here a layer's experts come and are needed together.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        spec = trace.spec
        self._next = next_uses(pairs_of(trace)) * spec.num_layers + np.arange(spec.num_layers)[:, None]
        self._worth: Float64[np.ndarray, "F"] = np.full(spec.num_layers * spec.num_experts, -np.inf)

    def begin(self, token: int) -> None:
        """Nothing changes."""

    def use(self, token: int, layer: int, pairs: Int64[np.ndarray, "K"]) -> None:
        self._worth[pairs] = -self._next[token, layer]

    def worth(self) -> Worth:
        return self._worth
