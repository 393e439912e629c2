"""From probabilities to what a stream is told: ranked lists, as long and as far ahead as hello asked.

Hub -> `Forecasts.rankings` -> Connection

.venv/bin/python -m pytest tests/service/stream/test_forecasts.py
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Integer, UInt16

from service.answers import DEFAULT_TOP_K_MULTIPLE
from service.errors import MessageInvalid
from service.loading import Running
from service.stream.hub import Due
from service.stream.messages import Hello, Kind, Ranking
from speculation.adaptive_coverage import AdaptiveCoverage
from speculation.demand import union_demand
from speculation.ranking import rank

ONE_OF_THEM = "Give top_n, or coverage, or neither for 2 * top_k experts a layer."


class Forecasts:
    """What a hello asks for. Raises MessageInvalid, or CoverageUnknown, where this version cannot give it."""

    def __init__(self, hello: Hello, running: Running) -> None:
        self._hello = hello
        self._spec = running.speculator.spec
        _check(hello, running)
        self._top_n = hello.top_n or min(self._spec.num_experts, DEFAULT_TOP_K_MULTIPLE * self._spec.top_k)
        self._published, self._adaptive = None, None
        if hello.coverage is not None and hello.adapt:
            self._adaptive = AdaptiveCoverage(running.speculator, levels=(hello.coverage,))
        elif hello.coverage is not None:
            self._published = running.speculator.coverage_sets(hello.coverage)
        self._alike: UInt16[np.ndarray, "1 L"] = np.full((1, self._spec.num_layers), self._top_n, np.uint16)

    @property
    def adapts(self) -> bool:
        """Whether coverage learns from its misses, so that finished tokens are to be told."""
        return self._adaptive is not None

    def learn(
        self, forecasts: list[tuple[int, Float32[np.ndarray, "L E"]]], routing: Integer[np.ndarray, "L K"]
    ) -> None:
        """The forecasts of a finished token, each with the layers seen, and what it was routed to."""
        if self._adaptive is not None:
            self._adaptive.observe(forecasts, routing)

    def rankings(
        self,
        due: Due,
        names: list[int],
        tokens: list[int],
        dropped: int,
        probabilities: Float32[np.ndarray, "n L E"],
    ) -> Iterator[tuple[Kind, Ranking]]:
        """A forecast, a union, or both."""
        layers = slice(due.seen, self._end(due.seen))
        ahead = probabilities[:, layers]
        sets = self._published if self._adaptive is None else self._adaptive.sets(0)
        if sets is None:
            sizes, width = self._alike_of(len(probabilities), layers), self._top_n
        else:
            sizes = sets.sizes(probabilities, due.seen)[:, layers]
            width = int(sizes.max())
        experts, ranked = rank(ahead, width)
        head = (due.tag, due.seen, dropped, names, tokens)
        if self._hello.per_sequence:
            yield Kind.FORECAST, Ranking(*head, experts, ranked, sizes)
        if self._hello.union:
            demand = union_demand(ahead)
            if sets is None:
                yield Kind.UNION, Ranking(*head, *rank(demand, width), sizes[0])
            else:
                yield Kind.UNION, Ranking(*head, *_covering(demand, experts, sizes))

    def _alike_of(self, count: int, layers: slice) -> Integer[np.ndarray, "n m"]:
        alike: UInt16[np.ndarray, "n m"] = self._alike[:, layers]  # of one sequence nothing need be made
        return alike if count == 1 else alike.repeat(count, 0)

    def _end(self, seen: int) -> int:
        ahead = self._hello.ahead
        return min(seen + ahead, self._spec.num_layers) if ahead else self._spec.num_layers


def _covering(
    demand: Float32[np.ndarray, "m E"],
    experts: Integer[np.ndarray, "n m w"],
    sizes: Integer[np.ndarray, "n m"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(experts, probabilities, sizes) of every expert that is in some sequence's set, by demand."""
    listed = np.arange(experts.shape[-1]) < sizes[..., None]  # [n, m, w]
    members = np.zeros((len(experts), *demand.shape), bool)
    np.put_along_axis(members, experts.astype(np.int64), listed, axis=-1)
    chosen = members.any(axis=0)  # [m, E]
    union_sizes = chosen.sum(axis=-1)
    # An expert in no set has no chance here, so that it ranks behind those that are.
    wanted, ranked = rank(np.where(chosen, demand, np.float32(0)), int(union_sizes.max()))
    return wanted, ranked, union_sizes


def _check(hello: Hello, running: Running) -> None:
    spec = running.speculator.spec
    if hello.top_n is not None and hello.coverage is not None:
        raise MessageInvalid(
            f"top_n {hello.top_n} and coverage {hello.coverage} came together, expected one of them.",
            remedy=ONE_OF_THEM,
        )
    if hello.top_n is not None and not 1 <= hello.top_n <= spec.num_experts:
        raise MessageInvalid(
            f"top_n is {hello.top_n}, but {spec.model} has {spec.num_experts} experts a layer.",
            remedy=f"Ask for 1 to {spec.num_experts}.",
        )
    if hello.coverage is not None and not 0 < hello.coverage < 1:
        raise MessageInvalid(
            f"coverage is {hello.coverage}, expected a probability between 0 and 1.", remedy=ONE_OF_THEM
        )
    if hello.adapt and hello.coverage is None:
        raise MessageInvalid(
            "adapt came without coverage: there is nothing that could adapt.",
            remedy="Give coverage, or leave adapt out.",
        )
    if not (hello.per_sequence or hello.union):
        raise MessageInvalid(
            "hello asks for nothing: neither forecasts for each sequence nor union demand.",
            remedy="Ask for one of them, or both.",
        )
