"""Sets that learn from their misses: the level holds in the long run, whatever the routing does."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.manifest import Coverage
from speculation.adaptive_coverage import (
    LARGEST_LOG_ODDS,
    AdaptiveCoverage,
    BudgetThreshold,
    budget_of,
    groups,
    needed_of,
)
from speculation.errors import CoverageUnknown, InputInvalid
from speculation.runtime import Speculator
from tests.toy_version import TOY_SPEC, toy_stored

SPECULATOR = Speculator(toy_stored(), provider="cpu")

LAYERS, EXPERTS, K = TOY_SPEC.num_layers, TOY_SPEC.num_experts, TOY_SPEC.top_k


@pytest.fixture
def running() -> AdaptiveCoverage:
    return AdaptiveCoverage(SPECULATOR)


def made_up(rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Probabilities [L, E] whose odds may be stretched."""
    p = 1 / (1 + np.exp(-scale * rng.normal(-1, 2, (LAYERS, EXPERTS))))
    return np.asarray(p, np.float32)


def routed(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    """K experts of each layer, the probable ones more often."""
    return np.argsort(-(np.log(p) + rng.gumbel(size=p.shape)), axis=-1)[:, :K]


def test_it_begins_with_the_published_sets(running: AdaptiveCoverage) -> None:
    p = made_up(np.random.default_rng(1))
    for seen in range(LAYERS):
        published = [SPECULATOR.coverage_sets(level).sizes(p, seen) for level in running.levels]
        assert np.array_equal(running.sizes(p, seen), published)


def test_sets_of_a_level_are_its_sizes_and_move_with_it() -> None:
    running, rng = AdaptiveCoverage(SPECULATOR, levels=(0.93, 0.9)), np.random.default_rng(4)
    assert running.levels == (0.95, 0.9)
    for _ in range(20):
        p = made_up(rng)
        for seen in range(LAYERS):
            sizes = [running.sets(number).sizes(p, seen) for number in (0, 1)]
            assert np.array_equal(running.sizes(p, seen), sizes)
        running.observe([(0, p), (2, p)], routed(rng, 1 - p))
    assert (running.correction[:, 0] > 0).all()


def test_many_forecasts_at_once_are_as_one_by_one(running: AdaptiveCoverage) -> None:
    rng = np.random.default_rng(2)
    p, seen = np.stack([made_up(rng) for _ in range(3)]), np.array([0, 2, 1])
    one_by_one = np.stack([running.sizes(of_it, s) for of_it, s in zip(p, seen, strict=True)], axis=1)
    assert np.array_equal(running.sizes(p, seen), one_by_one)


def test_without_steps_they_stay() -> None:
    running, rng = AdaptiveCoverage(SPECULATOR, step=0.0), np.random.default_rng(3)
    before = running.thresholds()
    for _ in range(20):
        p = made_up(rng)
        running.observe([(0, p)], routed(rng, 1 - p))
    assert np.array_equal(running.thresholds(), before)


def test_misses_lower_thresholds_and_hits_raise_them(running: AdaptiveCoverage) -> None:
    before = running.thresholds()
    every = [
        (seen, np.linspace(0.9, 0.01, EXPERTS, dtype=np.float32)[None].repeat(LAYERS, 0)) for seen in (0, 1)
    ]
    worst, best = (np.tile(experts, (LAYERS, 1)) for experts in ([EXPERTS - 1, EXPERTS - 2], [0, 1]))
    running.observe(every, worst)
    lowered = running.thresholds()
    for seen in (0, 1):
        assert (lowered[:, seen, seen:] < before[:, seen, seen:]).all()
    for _ in range(200):
        running.observe(every, best)
    assert (running.thresholds()[:, 0] > before[:, 0]).all()


def test_only_what_was_forecast_counts(running: AdaptiveCoverage) -> None:
    running.observe([], np.zeros((LAYERS, K), int))
    assert not running.correction.any()
    p = np.linspace(0.9, 0.01, EXPERTS, dtype=np.float32)[None].repeat(LAYERS, 0)
    running.observe([(0, p)], np.tile([EXPERTS - 1, EXPERTS - 2], (LAYERS, 1)))  # at token start alone
    assert np.flatnonzero(running.correction[0]).tolist() == [0]


def test_a_layer_that_was_seen_has_no_set_however_far_thresholds_fall() -> None:
    running = AdaptiveCoverage(SPECULATOR, step=100.0)
    p = np.full((LAYERS, EXPERTS), 1e-6, np.float32)
    running.observe([(1, p)], np.tile([EXPERTS - 1, EXPERTS - 2], (LAYERS, 1)))
    assert running.sizes(p, 1)[0].tolist() == [0, EXPERTS, EXPERTS, EXPERTS]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 3), st.floats(0.3, 3), st.sampled_from([0.2, 0.4, 1.0]))
def test_misses_are_kept_down_in_the_long_run_through_any_shift(
    seed: int, before: float, after: float, step: float
) -> None:
    """The bound of the module's docstring: what is moved is bounded, so misses even out."""
    rng, tokens = np.random.default_rng(seed), 400
    running = AdaptiveCoverage(SPECULATOR, step=step)
    missed = np.zeros(len(running.levels))
    for token in range(tokens):
        truth = made_up(rng)
        told = made_up(rng, before if token < tokens // 2 else after)  # knows nothing
        needed = needed_of(told, routing := routed(rng, truth))
        missing = needed > running.sizes(told, 0)
        missed += missing.mean(axis=-1)
        twin = deepcopy(running)
        twin.move(np.array([0]), missing[:, None])
        running.observe([(0, told)], routing)
        assert np.array_equal(running.correction, twin.correction)
    allowed = 2 * (LARGEST_LOG_ODDS + step) / (step * tokens)
    assert (missed / tokens - (1 - np.array(running.levels)) <= allowed).all()


def test_needs_are_the_rank_of_the_last_routed_expert() -> None:
    probabilities = np.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert needed_of(probabilities, np.array([[1, 3], [2, 0]])).tolist() == [3, 3]


ONE_EXPERT = (tuple((1,) * (layer + 1) for layer in range(LAYERS)),)


@pytest.mark.parametrize(
    "without",
    [Coverage(levels=(), experts=()), Coverage(levels=(0.9,), experts=ONE_EXPERT)],
    ids=["no tables", "numbers of experts"],
)
def test_a_version_without_thresholds_says_so(without: Coverage) -> None:
    whole = toy_stored()
    manifest = whole.manifest.model_copy(update={"coverage": without})
    with pytest.raises(CoverageUnknown, match=r"toy/1 has no thresholds .*\. Take a newer"):
        AdaptiveCoverage(Speculator(replace(whole, manifest=manifest), provider="cpu"))


def test_groups_are_token_start_and_doubling_distances() -> None:
    table = groups(20)
    assert (table[0] == 0).all()
    assert table[1, 1:].tolist() == [1, 2, 2, *[3] * 4, *[4] * 8, *[5] * 4]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 8), st.floats(0.3, 3))
def test_a_budget_is_kept_on_average_through_a_shift(seed: int, budget: float, sharpness: float) -> None:
    rng = np.random.default_rng(seed)
    running = BudgetThreshold(budget)
    fetched = []
    for token in range(3000):
        scale = sharpness if token < 1500 else 1.0
        probabilities = 1 / (1 + np.exp(-scale * rng.normal(-1, 2, (LAYERS, EXPERTS))))
        fetched.append(running.chosen(probabilities).sum() / LAYERS)
        running.observe(fetched[-1])
    assert np.mean(fetched[500:]) == pytest.approx(budget, rel=0.1)


def test_the_threshold_stays_between_0_and_1() -> None:
    running = BudgetThreshold(1.0)
    for fetched in (1e9, 0.0):
        for _ in range(1000):
            running.observe(fetched)
        assert 0 < running.threshold < 1


def test_bytes_a_token_are_experts_a_layer() -> None:
    assert budget_of(bytes_per_token=4_800, expert_bytes=100, num_layers=24) == 2.0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: AdaptiveCoverage(SPECULATOR, step=-1.0),
        lambda: BudgetThreshold(0.0),
        lambda: BudgetThreshold(1.0, threshold=1.0),
        lambda: budget_of(0.0, 1.0, 24),
    ],
    ids=["step", "budget", "threshold", "bytes"],
)
def test_what_makes_no_sense_is_refused(wrong: object) -> None:
    with pytest.raises(InputInvalid, match="expected"):
        wrong()  # type: ignore[operator]
