"""The simulated expert cache by hand and against a naive one; the replay with answers made up here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoe.errors import ReplayError
from specmoe.expert_cache import ExpertCache
from specmoe.replay import Replay, cache_capacity
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace

SPEC = RoutingSpec(model="toy", num_layers=4, num_experts=6, top_k=2)


class NaiveCache:
    """As ExpertCache is described: every expert with the time of its last touch; slow and obvious."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.clock = capacity, 0
        self.touched: dict[tuple[int, int], int] = {}
        self.unused: set[tuple[int, int]] = set()
        self.counts = {"uses": 0, "hits": 0, "fetched_ahead": 0, "useful": 0, "wasted": 0}

    def touch(self, key: tuple[int, int]) -> None:
        self.clock += 1
        if key not in self.touched and len(self.touched) == self.capacity:
            oldest = min(self.touched, key=lambda other: self.touched[other])
            del self.touched[oldest]
            self.counts["wasted"] += oldest in self.unused
            self.unused.discard(oldest)
        self.touched[key] = self.clock

    def use(self, layer: int, experts: Sequence[int]) -> None:
        keys = [(layer, expert) for expert in experts]
        self.counts["uses"] += len(keys)
        for key in sorted(keys, key=lambda key: key not in self.touched):
            if key in self.touched:
                self.counts["hits"] += 1
                self.counts["useful"] += key in self.unused
                self.unused.discard(key)
            self.touch(key)

    def prefetch(self, forecast: Sequence[tuple[int, Sequence[int]]]) -> None:
        keys = [(layer, expert) for layer, experts in forecast for expert in experts]
        for key in keys[: self.capacity][::-1]:
            if key not in self.touched:
                self.counts["fetched_ahead"] += 1
                self.unused.add(key)
            self.touch(key)


def counts(cache: ExpertCache) -> dict[str, int]:
    return {name: getattr(cache, name) for name in ("uses", "hits", "fetched_ahead", "useful", "wasted")}


def test_the_least_recently_used_expert_is_evicted() -> None:
    cache = ExpertCache(3)
    cache.use(0, [1, 2])  # both missing
    cache.use(1, [1])  # missing: another layer's expert 1 is another expert
    cache.use(0, [2])  # resident
    cache.use(1, [5])  # missing, evicts layer 0's expert 1
    cache.use(0, [1])  # so it is missing again, and evicts layer 1's expert 1
    cache.use(0, [2])  # still resident
    assert (cache.uses, cache.hits, cache.misses) == (7, 2, 5)
    assert cache.hit_rate == 2 / 7


def test_a_missing_expert_evicts_none_that_its_own_layer_needs() -> None:
    cache = ExpertCache(2)
    cache.use(0, [1])
    cache.use(0, [2])
    cache.use(0, [3, 1])  # 1 is the oldest but needed: 2 goes
    cache.use(0, [1])
    assert cache.hits == 2


def test_fetches_ahead_are_useful_once_wasted_once_or_still_open() -> None:
    cache = ExpertCache(3)
    cache.prefetch([(0, [1, 2]), (1, [3])])
    cache.use(0, [1])
    cache.use(0, [1])  # used again: counted once
    cache.use(2, [0])  # evicts the least sure one: layer 1's expert 3
    assert counts(cache) == {"uses": 3, "hits": 2, "fetched_ahead": 3, "useful": 1, "wasted": 1}


def test_what_is_resident_is_not_fetched_but_kept_by_a_forecast() -> None:
    cache = ExpertCache(2)
    cache.use(0, [1])
    cache.use(0, [2])
    cache.prefetch([(0, [1])])
    cache.use(0, [3])  # evicts 2, not 1
    cache.use(0, [1])
    assert (cache.fetched_ahead, cache.hits) == (0, 1)


def test_of_a_forecast_larger_than_the_cache_the_nearest_and_surest_are_fetched() -> None:
    cache = ExpertCache(2)
    cache.prefetch([(0, [5]), (1, [4, 3]), (2, [2])])
    cache.use(0, [5])
    cache.use(1, [4])
    assert (cache.hits, cache.fetched_ahead, cache.wasted) == (2, 2, 0)


LAYER = st.integers(0, 2)
EXPERTS = st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True)
STEP = st.one_of(
    st.tuples(st.just("use"), LAYER, EXPERTS), st.tuples(st.just("prefetch"), st.lists(EXPERTS, max_size=3))
)


@given(capacity=st.integers(3, 12), steps=st.lists(STEP, max_size=40))
def test_the_cache_counts_as_a_naive_one_does(capacity: int, steps: list[Any]) -> None:
    cache, naive = ExpertCache(capacity), NaiveCache(capacity)
    for kind, *arguments in steps:
        if kind == "prefetch":
            arguments = [list(enumerate(arguments[0]))]
        getattr(cache, kind)(*arguments)
        getattr(naive, kind)(*arguments)
    assert counts(cache) == naive.counts


@given(steps=st.lists(STEP, max_size=40))
def test_no_fetch_is_lost_and_none_counted_twice(steps: list[Any]) -> None:
    cache = ExpertCache(4)
    for kind, *arguments in steps:
        getattr(cache, kind)(*([list(enumerate(arguments[0]))] if kind == "prefetch" else arguments))
    assert 0 <= cache.useful + cache.wasted <= cache.fetched_ahead
    assert cache.useful <= cache.hits <= cache.uses


def trace(tokens: int = 12) -> RoutingTrace:
    """Two sequences, whose routing never repeats within a layer in neighbouring tokens."""
    first = (np.arange(tokens)[:, None] * 2 + np.arange(SPEC.num_layers)) % SPEC.num_experts
    experts = np.stack([first, (first + 1) % SPEC.num_experts], axis=-1).astype(np.int16)
    return RoutingTrace(SPEC, experts, None, None, np.array([0, 5, tokens]), ("a", "b"))


def replayed(recorded: RoutingTrace, ask: Any, **changes: Any) -> Replay:
    options: dict[str, Any] = {"every": 2, "prefetch": 2, "cache_share": 0.5}
    replay = Replay(recorded, ask, **(options | changes))
    for token in range(recorded.num_tokens):
        replay.play(token, 0 if token < 5 else 5)
    return replay


def oracle(recorded: RoutingTrace, order: slice = slice(None)) -> Any:
    """Ranks the experts that the router will choose first, or, with the order reversed, last."""

    def ask(token: int, start: int, seen: int) -> np.ndarray:
        routed = (recorded.experts[token, seen:, :, None] == np.arange(SPEC.num_experts)).any(1)  # [M, E]
        return np.argsort(~routed, axis=1, kind="stable")[:, order]

    return ask


def test_a_perfect_forecast_hits_always_and_wastes_nothing() -> None:
    report = replayed(trace(), oracle(trace())).report()
    assert {row["recall_at_k"] for row in report["recall"].values()} == {1.0}
    ahead = report["cache"]["lru_and_forecast"]
    assert (ahead["hit_rate"], ahead["fetched_ahead_wasted"]) == (1.0, 0)
    assert report["cache"]["lru"]["hit_rate"] < 1


def test_an_inverted_forecast_recalls_nothing_and_wastes() -> None:
    report = replayed(trace(), oracle(trace(), slice(None, None, -1))).report()
    assert {row["recall_at_2k"] for row in report["recall"].values()} == {0.0}
    assert report["cache"]["lru_and_forecast"]["fetched_ahead_wasted"] > 0


def test_without_answers_both_caches_are_the_same_and_nothing_is_recalled() -> None:
    report = replayed(trace(), lambda token, start, seen: None).report()
    assert report["recall"] == {}
    assert report["cache"]["lru"] == report["cache"]["lru_and_forecast"]


def test_recall_by_distance_worked_by_hand() -> None:
    routing = np.array([[[0, 1], [2, 3], [4, 5], [0, 1]]], np.int16)
    recorded = RoutingTrace(SPEC, routing, None, None, np.array([0, 1]), ("a",))
    answers = {
        0: [[0, 5, 1, 4], [0, 1, 4, 5], [4, 5, 0, 1], [2, 3, 4, 5]],  # of 8: 3 in two, 4 in four
        2: [[5, 0, 1, 2], [3, 2, 0, 1]],  # distance 1: 1 of 2, 1 of 2; distance 2: 0 of 2, 2 of 2
    }
    replay = Replay(
        recorded, lambda token, start, seen: np.array(answers[seen]), every=2, prefetch=2, cache_share=1
    )
    replay.play(0, 0)
    assert replay.recall.report() == {
        "start": {"recall_at_k": 3 / 8, "recall_at_2k": 4 / 8, "experts": 8},
        "1": {"recall_at_k": 0.5, "recall_at_2k": 0.5, "experts": 2},
        "2": {"recall_at_k": 0.0, "recall_at_2k": 1.0, "experts": 2},
    }


def test_sets_and_their_coverage_worked_by_hand() -> None:
    routing = np.array([[[0, 1], [2, 3], [4, 5], [0, 1]]], np.int16)
    recorded = RoutingTrace(SPEC, routing, None, None, np.array([0, 1]), ("a",))
    answers = {
        0: [[0, 5, 1], [0, 2, -1], [5, 4, -1], [1, 0, 2]],  # all but the second; 10 experts in 4 sets
        2: [[4, 5, 3, 2], [3, 1, -1, -1]],  # distance 1: held; distance 2: not
    }
    replay = Replay(
        recorded, lambda token, start, seen: np.array(answers[seen]), every=2, prefetch=None, cache_share=1
    )
    replay.play(0, 0)
    report = replay.report()
    assert report["recall"] == {}
    assert report["coverage"] == {
        "start": {"covered": 0.75, "mean_set_size": 2.5, "layers": 4},
        "1": {"covered": 1.0, "mean_set_size": 4.0, "layers": 1},
        "2": {"covered": 0.0, "mean_set_size": 2.0, "layers": 1},
        "all": {"covered": 4 / 6, "mean_set_size": 16 / 6, "layers": 6},
    }
    # Of the sets for layers 0 and 1, then for 2 and 3, all are fetched and one routed expert each is missing.
    assert report["cache"]["lru_and_forecast"]["fetched_ahead"] == 5 + 6
    assert report["cache"]["lru_and_forecast"]["fetched_on_demand"] == 2


@pytest.mark.parametrize(
    ("every", "questions"), [(0, [0]), (1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (4, [0]), (9, [0])]
)
def test_questions_come_at_token_start_and_after_every_so_many_layers(
    every: int, questions: list[int]
) -> None:
    asked: list[int] = []
    replayed(trace(1), lambda token, start, seen: asked.append(seen), every=every)
    assert asked == questions


def test_every_token_is_asked_about_with_the_start_of_its_sequence() -> None:
    asked: list[tuple[int, int]] = []
    replayed(trace(7), lambda token, start, seen: asked.append((token, start)), every=0)
    assert asked == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 5), (6, 5)]


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan"), 0.01])
def test_an_impossible_cache_is_refused(share: float) -> None:
    with pytest.raises(ReplayError, match="cache share"):
        cache_capacity(SPEC, share)
