"""What evaluation says of coverage sets with adaptation: as counted by metrics, and better under a shift."""

import numpy as np
import pytest

from model_store.manifest import Coverage
from speculation.runtime import Speculator
from tests.toy_version import toy_stored
from tests.training.toy_routing import SPEC, toy_trace
from training.adaptation import ALL, adaptation_report, adapted, needs, shares
from training.evaluate import score_version

TRACE = toy_trace((300, 200), seed=4)


@pytest.fixture(scope="module")
def speculator() -> Speculator:
    return Speculator(toy_stored(), provider="cpu")


@pytest.mark.parametrize("every", [1, 3])
def test_published_sizes_cover_what_metrics_count(speculator: Speculator, every: int) -> None:
    found = needs(speculator, TRACE, every=every)
    covered, _ = adapted(found, speculator.manifest.coverage, SPEC, step=0.0)
    scored = score_version(speculator, TRACE, every=every).distances()
    for row, level in enumerate(("0.9", "0.95", "0.99")):
        assert covered[:, row, 0].mean() == pytest.approx(scored["start"]["coverage"][level]["covered"])


def test_with_adaptation_the_levels_hold_where_the_tables_do_not(speculator: Speculator) -> None:
    report = adaptation_report(speculator, TRACE)
    assert set(report) == {ALL, "maths", "prose"}
    for level, published in report[ALL]["published"].items():
        came = report[ALL]["adapted"][level]["covered"]
        assert abs(came - float(level)) <= abs(published["covered"] - float(level)) + 0.005
        assert came == pytest.approx(float(level), abs=0.05)


def test_domains_add_up_to_all(speculator: Speculator) -> None:
    report = adaptation_report(speculator, TRACE)
    weighed = (
        300 * report["prose"]["adapted"]["0.9"]["covered"]
        + 200 * report["maths"]["adapted"]["0.9"]["covered"]
    )
    assert weighed / 500 == pytest.approx(report[ALL]["adapted"]["0.9"]["covered"])


def test_sets_do_not_depend_on_what_comes_later(speculator: Speculator) -> None:
    found = needs(speculator, TRACE)
    coverage: Coverage = speculator.manifest.coverage
    _, whole = adapted(found, coverage, SPEC)
    _, part = adapted(found[:100], coverage, SPEC)
    assert np.array_equal(whole[:100], part)


def test_shares_are_over_forecasts_alone() -> None:
    sizes = np.zeros((2, 1, 2, 2), np.int16)
    sizes[:, 0, 0] = 3
    covered = np.zeros(sizes.shape, bool)
    covered[0, 0, 0] = True
    assert shares(covered, sizes, (0.9,)) == {"0.9": {"covered": 0.5, "mean_set_size": 3.0}}
