"""Sets that learn from their misses: the level holds in the long run, whatever the routing does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.manifest import Coverage
from speculation.adaptive_coverage import (
    AdaptiveCoverage,
    BudgetThreshold,
    budget_of,
    groups,
    needed_of,
)
from speculation.coverage import coverage_size
from speculation.errors import CoverageUnknown, InputInvalid
from traces.spec import RoutingSpec

SPEC = RoutingSpec("toy", num_layers=6, num_experts=16, top_k=2)


def tables(*sizes: int) -> Coverage:
    """One size for every layer and distance, by level."""
    levels = (0.8, 0.9)[: len(sizes)]
    triangle = [[(size,) * (layer + 1) for layer in range(SPEC.num_layers)] for size in sizes]
    return Coverage(levels=levels, experts=tuple(tuple(table) for table in triangle))


def forecasts(needed: np.ndarray) -> np.ndarray:
    """Needs of every layer, the same whatever was seen. needed: [L]."""
    seen, layer = np.arange(SPEC.num_layers)[:, None], np.arange(SPEC.num_layers)
    return np.where(layer >= seen, needed, 0)


def test_it_begins_with_the_published_sizes() -> None:
    coverage = tables(4, 6)
    sizes = AdaptiveCoverage(coverage, SPEC).sizes
    for row, level in enumerate(coverage.levels):
        for layer in range(SPEC.num_layers):
            for seen in range(SPEC.num_layers):
                expected = coverage_size(coverage, level, layer, seen) if seen <= layer else 0
                assert sizes[row, seen, layer] == expected


def test_without_steps_they_stay() -> None:
    running = AdaptiveCoverage(tables(4, 6), SPEC, step=0.0)
    before = running.sizes
    for _ in range(20):
        running.observe(forecasts(np.full(SPEC.num_layers, SPEC.num_experts)))
    assert np.array_equal(running.sizes, before)


def test_misses_make_sets_larger_and_hits_smaller() -> None:
    running = AdaptiveCoverage(tables(4), SPEC)
    running.observe(forecasts(np.full(SPEC.num_layers, 9)))
    assert (running.correction > 0).sum() == 4  # no distance is 8 or more
    grown = running.sizes.sum()
    for _ in range(200):
        running.observe(forecasts(np.full(SPEC.num_layers, 1)))
    assert running.sizes.sum() < tables_sum(4) < grown


def tables_sum(size: int) -> int:
    return size * SPEC.num_layers * (SPEC.num_layers + 1) // 2


def test_only_what_was_forecast_counts() -> None:
    running = AdaptiveCoverage(tables(4), SPEC)
    needed = np.zeros((SPEC.num_layers, SPEC.num_layers), int)
    running.observe(needed)
    assert not running.correction.any()
    needed[0] = 16  # at token start alone
    running.observe(needed)
    assert np.flatnonzero(running.correction[0]).tolist() == [0]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(1, 16), st.floats(1, 16), st.sampled_from([0.5, 1.0, 2.0]))
def test_coverage_holds_in_the_long_run_through_any_shift(
    seed: int, before: float, after: float, step: float
) -> None:
    """The bound of the module's docstring: what is moved stays within E, so misses even out."""
    rng = np.random.default_rng(seed)
    running = AdaptiveCoverage(tables(4, 6), SPEC, step=step)
    misses, tokens = np.zeros(2), 400
    for token in range(tokens):
        mean = before if token < tokens // 2 else after
        needed = forecasts(rng.poisson(mean, SPEC.num_layers).clip(1, SPEC.num_experts))
        misses += (needed > running.sizes)[:, 0].mean(axis=-1)  # at token start, one group
        running.observe(needed)
    allowed = 2 * (SPEC.num_experts + step) / (step * tokens)
    assert np.abs(misses / tokens - [0.2, 0.1]).max() <= allowed


def test_needs_are_the_rank_of_the_last_routed_expert() -> None:
    probabilities = np.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert needed_of(probabilities, np.array([[1, 3], [2, 0]])).tolist() == [3, 3]


def test_a_version_without_tables_says_so() -> None:
    with pytest.raises(CoverageUnknown, match="no coverage tables"):
        AdaptiveCoverage(Coverage(levels=(), experts=()), SPEC)


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
        probabilities = 1 / (1 + np.exp(-scale * rng.normal(-1, 2, (SPEC.num_layers, SPEC.num_experts))))
        fetched.append(running.chosen(probabilities).sum() / SPEC.num_layers)
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
        lambda: AdaptiveCoverage(tables(4), SPEC, step=-1.0),
        lambda: BudgetThreshold(0.0),
        lambda: BudgetThreshold(1.0, threshold=1.0),
        lambda: budget_of(0.0, 1.0, 24),
    ],
    ids=["step", "budget", "threshold", "bytes"],
)
def test_what_makes_no_sense_is_refused(wrong: object) -> None:
    with pytest.raises(InputInvalid, match="expected"):
        wrong()  # type: ignore[operator]
