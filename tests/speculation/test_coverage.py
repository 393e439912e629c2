"""Coverage tables: the level asked for or the next higher one, and nothing made up."""

from __future__ import annotations

import pytest

from model_store.manifest import Coverage
from speculation.coverage import coverage_size
from speculation.errors import CoverageUnknown

COVERAGE = Coverage(
    levels=(0.99, 0.9, 0.95),
    experts=(((3,), (6, 9)), ((1,), (4, 7)), ((2,), (5, 8))),
)


@pytest.mark.parametrize(
    ("level", "size"), [(0.9, 4), (0.95, 5), (0.99, 6), (0.5, 4), (0.91, 5), (0.951, 6), (1e-9, 4)]
)
def test_a_level_is_answered_by_itself_or_the_next_higher(level, size):
    assert coverage_size(COVERAGE, level, layer=1, seen=1) == size


@pytest.mark.parametrize(("layer", "seen", "size"), [(0, 0, 1), (1, 1, 4), (1, 0, 7)])
def test_the_distance_is_from_the_last_seen_layer(layer, seen, size):
    assert coverage_size(COVERAGE, 0.9, layer, seen) == size


@pytest.mark.parametrize("level", [0.999, 1.0, 1.5, 0.0, -0.5, float("nan"), float("inf")])
def test_a_level_beyond_the_tables_is_refused_with_those_there_are(level):
    with pytest.raises(
        CoverageUnknown, match=rf"Coverage {level} .*at most 0\.99\. Choose one of 0\.9, 0\.95, 0\.99, or ask"
    ):
        coverage_size(COVERAGE, level, 0, 0)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(CoverageUnknown, match=f"Layer {layer} was asked for, expected 0 to 1"):
        coverage_size(COVERAGE, 0.9, layer, 0)


@pytest.mark.parametrize("seen", [-1, 2])
def test_a_layer_that_was_seen_is_refused(seen):
    with pytest.raises(
        CoverageUnknown, match=f"Layer 1 was asked for with {seen} layers seen, expected 0 to 1"
    ):
        coverage_size(COVERAGE, 0.9, 1, seen)


def test_a_version_without_tables_says_so():
    with pytest.raises(CoverageUnknown, match=r"no coverage tables\. Ask for a number"):
        coverage_size(Coverage(levels=(), experts=()), 0.9, 0, 0)
