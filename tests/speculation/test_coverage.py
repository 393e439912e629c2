"""Coverage sets: the level asked for or the next higher, the first-ranked and the probable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.manifest import Coverage
from speculation.coverage import CoverageSets, all_sets, level_number
from speculation.errors import CoverageUnknown
from speculation.runtime import Speculator
from tests.toy_version import LEVELS, TOY_SPEC, toy_stored

COVERAGE = Coverage(
    levels=(0.99, 0.9, 0.95),
    experts=(((3,), (6, 9)), ((1,), (4, 7)), ((2,), (5, 8))),
    thresholds=(((0.1,), (0.2, 0.3)), ((0.4,), (0.5, 0.6)), ((0.2,), (0.3, 0.4))),
)


@pytest.mark.parametrize(
    ("level", "number"), [(0.9, 1), (0.95, 2), (0.99, 0), (0.5, 1), (0.91, 2), (0.951, 0), (1e-9, 1)]
)
def test_a_level_is_answered_by_itself_or_the_next_higher(level: float, number: int) -> None:
    assert level_number(COVERAGE, level) == number


def test_the_distance_is_from_the_last_seen_layer() -> None:
    sets = all_sets(COVERAGE, 2)[1]
    assert sets.least.tolist() == [[1, 7], [0, 4]]
    assert sets.threshold == pytest.approx(np.array([[0.4, 0.6], [2.0, 0.5]]))


def test_versions_from_before_thresholds_have_a_number_of_experts_alone() -> None:
    (sets,) = all_sets(Coverage(levels=(0.9,), experts=(((1,), (4, 7)),)), 2)
    certain = np.ones((2, 9), np.float32)
    assert sets.sizes(certain, 0).tolist() == [1, 7]
    assert sets.sizes(certain, 1).tolist() == [0, 4]


SETS = all_sets(COVERAGE, 2)[1]


@pytest.mark.parametrize(
    ("probabilities", "size"),
    [
        ([0.9, 0.8, 0.1, 0.1, 0.1, 0.1], 4),  # as many as there are anyway
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.49], 5),  # and all that are so probable
        ([0.5] * 6, 6),
    ],
)
def test_a_set_has_the_first_ranked_and_all_that_are_probable(probabilities: list[float], size: int) -> None:
    assert SETS.sizes(np.array([probabilities] * 2, np.float32), 1).tolist() == [0, size]


@given(st.integers(0, 2**32 - 1))
def test_many_forecasts_at_once_are_as_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, seen = rng.random((5, 2, 9), np.float32), rng.integers(0, 2, 5)
    together = SETS.sizes(probabilities, seen)
    assert together.tolist() == [SETS.sizes(p, s).tolist() for p, s in zip(probabilities, seen, strict=True)]


@given(st.integers(0, 2**32 - 1))
def test_a_set_is_the_first_ranked_of_that_many(seed: int) -> None:
    """Whoever is in the set for being probable is ranked before whoever is not."""
    rng = np.random.default_rng(seed)
    p = rng.random((2, 9), np.float32)
    for layer, size in enumerate(SETS.sizes(p, 0).tolist()):
        members = np.sort(p[layer])[::-1][:size]
        assert set(p[layer][p[layer] >= SETS.threshold[0, layer]]) <= set(members)


@pytest.mark.parametrize("level", [0.999, 1.0, 1.5, 0.0, -0.5, float("nan"), float("inf")])
def test_a_level_beyond_the_tables_is_refused_with_those_there_are(level: float) -> None:
    with pytest.raises(
        CoverageUnknown, match=rf"Coverage {level} .*at most 0\.99\. Choose one of 0\.9, 0\.95, 0\.99, or ask"
    ):
        level_number(COVERAGE, level)


def test_a_version_without_tables_says_so() -> None:
    nothing = Coverage(levels=(), experts=())
    assert all_sets(nothing, 2) == ()
    with pytest.raises(CoverageUnknown, match=r"no coverage tables\. Ask for a number"):
        level_number(nothing, 0.9)


def test_a_speculator_has_the_sets_of_its_manifest() -> None:
    speculator = Speculator(toy_stored(), provider="cpu")
    sets: CoverageSets = speculator.coverage_sets(LEVELS[1])
    expected = all_sets(speculator.manifest.coverage, TOY_SPEC.num_layers)[1]
    assert np.array_equal(sets.least, expected.least)
    assert np.array_equal(sets.threshold, expected.threshold)
