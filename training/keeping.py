"""What to keep, by a version's own word: its outlook, and its forecast of the token in progress.

version + trace -> worths -> ByOutlook -> `training.cache_simulator`

    specmoe evaluate gpt-oss-20b --traces test.npz --cache
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from model_store.manifest import OUTLOOK
from speculation.ranking import rank
from speculation.runtime import Speculator
from traces.trace import RoutingTrace
from training.cache_simulator import (
    Clairvoyant,
    DecayedFrequency,
    LeastRecent,
    Policy,
    Worth,
    capacity_of,
    simulate,
)
from training.errors import check_same_shape
from training.forecasts import Inputs, states

# Shares of all layers' experts that are resident.
SHARES = (0.125, 0.25, 0.5)
# The best of .95, .98 and .99 on gpt-oss-20b's validation split, at every share.
DECAY = 0.95
# What a use by one of the next 8 tokens counts beside one by the next token: of .1, .25, .5 the best on that
# split, all shares together (.1: -.007 with a quarter resident, -.001 with half; .5: -.002 with an eighth).
# Outlooks of 4 tokens gain .002 with an eighth resident and lose .004 with half.
LATER = 0.25
# What uses by tokens to come count beside one by the token in progress.
NEXT = 0.8


class ByOutlook:
    """Keeps what is expected to be used.

    ahead: worth of each token's layers until they are routed. passed: worth of them after that.
    """

    def __init__(self, ahead: Float[np.ndarray, "N L E"], passed: Float[np.ndarray, "N L E"]) -> None:
        self._ahead, self._passed = ahead, passed
        self._worth = np.zeros(ahead.shape[1:], np.float32)

    def begin(self, token: int) -> None:
        """A new outlook: nothing of this token is used yet."""
        self._worth[:] = self._ahead[token]

    def use(self, token: int, layer: int, pairs: Int64[np.ndarray, "K"]) -> None:
        """The layer comes again with the next token only."""
        self._worth[layer] = self._passed[token, layer]

    def worth(self) -> Worth:
        return self._worth.reshape(-1)


def by_outlook(speculator: Speculator, trace: RoutingTrace) -> ByOutlook:
    """One call a token, before it begins: the outlook alone."""
    worth = _empty(trace)
    for rows, state in states(speculator, trace):
        worth[rows] = speculator.outlook(state)
    return ByOutlook(worth, worth)


def by_outlook_and_forecast(speculator: Speculator, trace: RoutingTrace) -> ByOutlook:
    """Four calls a token, when it begins: its forecast, the state as if that came true, and from there a
    forecast of the token after it, whose id is unknown, and the outlook.

    A layer that has passed is worth what the next token needs and, less so, what later ones do; one that is
    still ahead what this token needs and, less so, all of that. Nothing here is of the future.
    """
    ahead, passed = _empty(trace), _empty(trace)
    inputs = Inputs(trace)
    for rows, state in states(speculator, trace):
        token_ids, unseen, _ = inputs.of(rows, 0)
        forecast = speculator.predict(state, token_ids, unseen, None)
        likeliest, _ = rank(forecast, trace.spec.top_k)
        after = speculator.advance(state, token_ids, likeliest, None)
        passed[rows] = speculator.predict(after, None, unseen, None) + LATER * speculator.outlook(after)
        ahead[rows] = forecast + (1 - forecast) * NEXT * passed[rows]
    return ByOutlook(ahead, passed)


def cache_report(speculator: Speculator, trace: RoutingTrace) -> dict[str, dict[str, float]]:
    """Hit rate by policy and share of the experts resident, in one pool that all layers share.

    The cache is not emptied between sequences. With an outlook where the version has one.
    Raises SpecMismatch where the trace is of another shape.
    """
    check_same_shape(trace.spec, speculator.spec, speculator.origin)
    policies: dict[str, Callable[[], Policy]] = {
        "lru": lambda: LeastRecent(trace.spec),
        "lfu": lambda: DecayedFrequency(trace.spec),
        "decayed frequency": lambda: DecayedFrequency(trace.spec, DECAY),
    }
    if OUTLOOK in speculator.graphs:
        alone, both = by_outlook(speculator, trace), by_outlook_and_forecast(speculator, trace)
        policies |= {"outlook": lambda: alone, "outlook and forecast": lambda: both}
    policies["clairvoyant"] = lambda: Clairvoyant(trace)
    return {name: hit_rates(trace, make) for name, make in policies.items()}


def hit_rates(trace: RoutingTrace, policy: Callable[[], Policy]) -> dict[str, float]:
    """By share; those that hold not even one layer's experts are left out."""
    pairs = trace.spec.num_layers * trace.spec.num_experts
    return {
        f"{share:g}": simulate(trace, policy(), capacity_of(trace.spec, share)).hit_rate
        for share in SHARES
        if round(share * pairs) >= trace.spec.top_k
    }


def _empty(trace: RoutingTrace) -> np.ndarray[Any, Any]:
    shape = (trace.num_tokens, trace.spec.num_layers, trace.spec.num_experts)
    empty: Float32[np.ndarray, "N L E"] = np.zeros(shape, np.float32)
    return empty
