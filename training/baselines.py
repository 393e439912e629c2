"""What every predictor must beat: forecasts that need no training worth the name.

Fitted on training traces, scored on others beside the predictor. numpy only, and causal: the scores of a
token use earlier tokens of its sequence and its own layers already seen, nothing else. The oracle alone
breaks this: it checks that the scoring gives 100 % to a perfect forecast.

    specmoe evaluate gpt-oss-20b --traces test.npz --baselines --train-traces train.npz
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol, Self

import numpy as np
from jaxtyping import Float, Float32, Int, Int16

from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.errors import BaselineNotFitted, check_same_shape

# Counting is done on this many tokens at a time: 16 MB of routing maps for 32 layers of 32 experts.
CHUNK = 4096


class Baseline(Protocol):
    """A forecast to compare with.

    name: as in reports.  follows_layers: whether seen layers of the token change its scores.
    gives_probabilities: whether scores are probabilities of being routed; else they only rank.
    """

    name: ClassVar[str]
    follows_layers: ClassVar[bool]
    gives_probabilities: ClassVar[bool]

    def fit(self, trace: RoutingTrace) -> Self:
        """Learn from training routing. Returns itself."""
        ...

    def scores(self, trace: RoutingTrace, seen: int) -> Float[np.ndarray, "N L E"]:
        """Scores of every token when its layers 0 .. seen-1 are known; rows of those layers mean nothing.

        Raises BaselineNotFitted before `fit`, SpecMismatch for a trace of another shape.
        """
        ...


class Fitted:
    """What the baselines share: the shape they were fitted on, and how often each expert is routed."""

    name: ClassVar[str]
    follows_layers: ClassVar[bool] = False
    gives_probabilities: ClassVar[bool] = True
    _spec: RoutingSpec | None = None
    _popularity: Float32[np.ndarray, "L E"]

    def fit(self, trace: RoutingTrace) -> Self:
        self._spec = trace.spec
        self._popularity = popularity(trace)
        return self

    def _check(self, trace: RoutingTrace) -> None:
        if self._spec is None:
            raise BaselineNotFitted(
                f"The baseline {self.name} has seen no training routing.", remedy="Call fit(trace) first."
            )
        check_same_shape(trace.spec, self._spec, f"what {self.name} was fitted on")


class Random(Fitted):
    """Experts in random order, the same for the same place in the trace."""

    name = "random"
    gives_probabilities = False

    def scores(self, trace: RoutingTrace, seen: int) -> Float[np.ndarray, "N L E"]:
        self._check(trace)
        return np.random.default_rng(0).random(_shape(trace), dtype=np.float32)


class Popularity(Fitted):
    """How often the layer routed to the expert in training."""

    name = "popularity"

    def scores(self, trace: RoutingTrace, seen: int) -> Float[np.ndarray, "N L E"]:
        self._check(trace)
        return np.broadcast_to(self._popularity, _shape(trace))


class Repeat(Fitted):
    """The previous token's experts, then the popular ones; popularity alone for a sequence's first token."""

    name = "repeat"
    gives_probabilities = False

    def scores(self, trace: RoutingTrace, seen: int) -> Float[np.ndarray, "N L E"]:
        self._check(trace)
        return previous_maps(trace) + self._popularity / 2  # popularity orders them within


class ExponentialAverage(Fitted):
    """An exponential average of the sequence's routing so far, starting from popularity.

    The decay is the one of DECAYS with the best recall@k on the training traces.
    """

    name = "exponential average"
    DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
    # Enough to tell decays apart, 50 MB of scores for 32 layers of 32 experts.
    TOKENS_TO_CHOOSE_ON = 3 * CHUNK
    decay: float

    def fit(self, trace: RoutingTrace) -> Self:
        super().fit(trace)
        sample = _some_sequences(trace, self.TOKENS_TO_CHOOSE_ON)
        routed = routing_maps(sample)
        self.decay = max(self.DECAYS, key=lambda decay: _hits(self._average(sample, decay), routed))
        return self

    def scores(self, trace: RoutingTrace, seen: int) -> Float[np.ndarray, "N L E"]:
        self._check(trace)
        return self._average(trace, self.decay)

    def _average(self, trace: RoutingTrace, decay: float) -> Float32[np.ndarray, "N L E"]:
        maps = routing_maps(trace) * np.float32(1 - decay)
        averages = np.empty_like(maps)
        for start, stop in zip(trace.starts[:-1], trace.starts[1:], strict=True):
            average = self._popularity
            for token in range(start, stop):
                averages[token] = average
                average = average * np.float32(decay) + maps[token]
        return averages


class LayerMarkov(Fitted):
    """Transition counts from the last seen layer's experts to every later layer's, a table for each pair.

    A target's score is the mean, over the experts routed at the last seen layer, of how often each went along
    with it. With no layer seen, the previous token's experts at the same layer take that place; popularity
    for a sequence's first token. Tables hold about (L E)^2 / 2 numbers.
    """

    name = "layer markov"
    follows_layers = True
    # Training tokens' worth of popularity mixed into every row: rare experts have few counts of their own.
    PRIOR = 4.0

    def fit(self, trace: RoutingTrace) -> Self:
        super().fit(trace)
        layers, experts = self._popularity.shape
        ahead = [np.zeros((experts, layers - layer - 1, experts), np.float32) for layer in range(layers)]
        again = np.zeros((layers, experts, experts), np.float32)
        for maps, previous in _chunks(trace):
            again += previous.transpose(1, 2, 0) @ maps.transpose(1, 0, 2)
            for layer, counts in enumerate(ahead):
                counts += np.tensordot(maps[:, layer], maps[:, layer + 1 :], axes=(0, 0))
        top_k = trace.spec.top_k
        self._again = self._rates(again, self._popularity[:, None], top_k)
        self._ahead = [
            self._rates(counts, self._popularity[layer + 1 :], top_k) for layer, counts in enumerate(ahead)
        ]
        return self

    def scores(self, trace: RoutingTrace, seen: int) -> Float[np.ndarray, "N L E"]:
        self._check(trace)
        scores = np.zeros(_shape(trace), np.float32)
        if seen:
            last = _maps_of(trace.experts[:, seen - 1], trace.spec)
            scores[:, seen:] = np.tensordot(last, self._ahead[seen - 1], axes=1) / trace.spec.top_k
            return scores
        again = previous_maps(trace).transpose(1, 0, 2) @ self._again  # L N E
        scores[:] = again.transpose(1, 0, 2) / trace.spec.top_k
        scores[_first_tokens(trace)] = self._popularity
        return scores

    @classmethod
    def _rates(
        cls, counts: Float32[np.ndarray, "*from E"], prior: Float32[np.ndarray, "*prior E"], top_k: int
    ) -> Float32[np.ndarray, "*from E"]:
        """How often the target expert goes along, from counts whose rows add up to k for every occurrence."""
        occurrences = counts.sum(axis=-1, keepdims=True) / top_k
        rates: Float32[np.ndarray, "*from E"] = (counts + cls.PRIOR * prior) / (occurrences + cls.PRIOR)
        return rates


class NearestMaps(Fitted):
    """What those training tokens did whose routing, in the token before and the layers seen, was most alike.

    Alike means most experts in common. The score is the share of the nearest ones that routed to the expert,
    popularity counted as one more. Memory is bounded: KEPT evenly spaced training tokens are compared with.
    """

    name = "nearest maps"
    follows_layers = True
    KEPT = 2048
    NEAREST = 24
    COMPARED_AT_ONCE = 512

    def fit(self, trace: RoutingTrace) -> Self:
        super().fit(trace)
        kept = np.unique(np.linspace(0, trace.num_tokens - 1, self.KEPT).astype(np.int64))
        before = previous_tokens(trace)[kept]
        self._experts = trace.experts[kept]
        self._maps = _maps_of(self._experts, trace.spec).reshape(len(kept), -1)
        previous = _maps_of(trace.experts[before], trace.spec) * (before >= 0)[:, None, None]
        self._previous = previous.reshape(len(kept), -1)
        return self

    def scores(self, trace: RoutingTrace, seen: int) -> Float[np.ndarray, "N L E"]:
        self._check(trace)
        maps, previous = routing_maps(trace), previous_maps(trace)
        scores = np.zeros_like(maps)
        for start in range(0, trace.num_tokens, self.COMPARED_AT_ONCE):
            part = slice(start, start + self.COMPARED_AT_ONCE)
            nearest = self._nearest(maps[part, :seen], previous[part])
            scores[part, seen:] = self._share(self._experts[nearest, seen:], seen)
        return scores

    def _nearest(
        self, seen: Float32[np.ndarray, "N S E"], previous: Float32[np.ndarray, "N L E"]
    ) -> Int[np.ndarray, "N M"]:
        tokens, layers, experts = seen.shape
        alike = previous.reshape(tokens, -1) @ self._previous.T
        alike += seen.reshape(tokens, -1) @ self._maps[:, : layers * experts].T
        among = min(self.NEAREST, alike.shape[1])
        return np.argpartition(-alike, among - 1, axis=1)[:, :among]

    def _share(self, experts: Int16[np.ndarray, "N M R K"], seen: int) -> Float32[np.ndarray, "N R E"]:
        tokens, among = experts.shape[:2]
        prior = self._popularity[seen:]
        first = np.arange(tokens)[:, None, None, None] * prior.size
        index = first + np.arange(len(prior))[:, None] * prior.shape[1] + experts
        votes = np.bincount(index.ravel(), minlength=tokens * prior.size).reshape(tokens, *prior.shape)
        share: Float32[np.ndarray, "N R E"] = ((votes + prior) / (among + 1)).astype(np.float32)
        return share


class Oracle(Fitted):
    """The truth itself: not a baseline but a check of the scoring, which must give it 100 %."""

    name = "oracle"

    def scores(self, trace: RoutingTrace, seen: int) -> Float[np.ndarray, "N L E"]:
        self._check(trace)
        return routing_maps(trace)


BASELINES: dict[str, Callable[[], Baseline]] = {
    kind.name: kind
    for kind in (Random, Popularity, Repeat, ExponentialAverage, LayerMarkov, NearestMaps, Oracle)
}


def routing_maps(trace: RoutingTrace) -> Float32[np.ndarray, "N L E"]:
    """1 where the token was routed to the expert, else 0."""
    return _maps_of(trace.experts, trace.spec)


def previous_tokens(trace: RoutingTrace) -> Int[np.ndarray, "N"]:
    """The row of the token before, -1 at a sequence's first token."""
    before = np.arange(trace.num_tokens) - 1
    before[_first_tokens(trace)] = -1
    return before


def previous_maps(trace: RoutingTrace) -> Float32[np.ndarray, "N L E"]:
    """The routing map of the token before, all zeros at a sequence's first token."""
    maps = np.roll(routing_maps(trace), 1, axis=0)
    maps[_first_tokens(trace)] = 0
    return maps


def popularity(trace: RoutingTrace) -> Float32[np.ndarray, "L E"]:
    """Share of the tokens that each layer routed to each expert."""
    layers, experts = trace.spec.num_layers, trace.spec.num_experts
    index = trace.experts + np.arange(layers)[:, None] * experts
    counts = np.bincount(index.ravel(), minlength=layers * experts).reshape(layers, experts)
    return (counts / trace.num_tokens).astype(np.float32)


def _shape(trace: RoutingTrace) -> tuple[int, int, int]:
    return trace.num_tokens, trace.spec.num_layers, trace.spec.num_experts


def _maps_of(experts: Int[np.ndarray, "*place K"], spec: RoutingSpec) -> Float32[np.ndarray, "*place E"]:
    maps = np.zeros((*experts.shape[:-1], spec.num_experts), np.float32)
    np.put_along_axis(maps, experts.astype(np.int64), 1, axis=-1)
    return maps


def _first_tokens(trace: RoutingTrace) -> Int[np.ndarray, "S"]:
    """Rows of the first tokens; a sequence without tokens has none."""
    return trace.starts[:-1][np.diff(trace.starts) > 0]


def _chunks(
    trace: RoutingTrace,
) -> Iterator[tuple[Float32[np.ndarray, "n L E"], Float32[np.ndarray, "n L E"]]]:
    """Routing maps of some tokens and of the token before each, through the trace."""
    before = previous_tokens(trace)
    for start in range(0, trace.num_tokens, CHUNK):
        rows = before[start : start + CHUNK]
        previous = _maps_of(trace.experts[rows], trace.spec) * (rows >= 0)[:, None, None]
        yield _maps_of(trace.experts[start : start + CHUNK], trace.spec), previous


def _some_sequences(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """Evenly spaced sequences with about `tokens` tokens together, one at least."""
    every = max(1, round(trace.num_tokens / tokens))
    return trace.select(range(0, trace.num_sequences, every))


def _hits(scores: Float[np.ndarray, "N L E"], maps: Float32[np.ndarray, "N L E"]) -> float:
    """How many routed experts are among the first k."""
    top_k = int(maps[0, 0].sum())
    first = np.argpartition(-scores, top_k - 1, axis=-1)[..., :top_k]
    return float(np.take_along_axis(maps, first, axis=-1).sum())
