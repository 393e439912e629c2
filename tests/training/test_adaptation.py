"""What evaluation says of coverage sets with adaptation: as counted by metrics, and better under a shift."""

from dataclasses import replace

import numpy as np
import pytest

from speculation.errors import CoverageUnknown
from speculation.runtime import Speculator
from tests.toy_version import toy_stored
from tests.training.toy_routing import toy_trace
from training import adaptation
from training.adaptation import ALL, Told, adaptation_report, adapted, shares, told
from training.evaluate import evaluate, score_version

TRACE = toy_trace((300, 200), seed=4)


@pytest.fixture(scope="module")
def speculator() -> Speculator:
    return Speculator(toy_stored(), provider="cpu")


@pytest.mark.parametrize("every", [1, 3])
def test_published_sets_cover_what_metrics_count(speculator: Speculator, every: int) -> None:
    found = told(speculator, TRACE, every=every)
    covered, sizes = adapted(found, speculator, step=0.0)
    scored = score_version(speculator, TRACE, every=every).distances()["start"]["coverage"]
    for row, level in enumerate(("0.9", "0.95", "0.99")):
        assert covered[:, row, 0].mean() == pytest.approx(scored[level]["covered"])
        assert sizes[:, row, 0].mean() == pytest.approx(scored[level]["mean_set_size"])


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
    found = told(speculator, TRACE)
    _, whole = adapted(found, speculator)
    _, part = adapted(Told(found.scores[:100], found.needed[:100], found.rows[:100]), speculator)
    assert np.array_equal(whole[:100], part)


def test_long_traces_are_told_of_fewer_tokens(
    monkeypatch: pytest.MonkeyPatch, speculator: Speculator
) -> None:
    whole = told(speculator, TRACE)
    monkeypatch.setattr(adaptation, "MAX_BYTES", whole.scores.nbytes // 2)
    fewer = told(speculator, TRACE)
    assert fewer.rows.tolist() == list(range(0, TRACE.num_tokens, 2))
    assert np.array_equal(fewer.needed, whole.needed[::2])


def test_a_version_without_thresholds_is_refused_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = toy_stored()
    coverage = stored.manifest.coverage.model_copy(update={"thresholds": ()})
    manifest = stored.manifest.model_copy(update={"coverage": coverage})
    monkeypatch.setattr("training.evaluate.of_speculator", None)
    with pytest.raises(CoverageUnknown, match="toy/1 has no thresholds"):
        evaluate(Speculator(replace(stored, manifest=manifest), provider="cpu"), TRACE, adapt=True)


def test_shares_are_over_forecasts_alone() -> None:
    sizes = np.zeros((2, 1, 2, 2), np.int16)
    sizes[:, 0, 0] = 3
    covered = np.zeros(sizes.shape, bool)
    covered[0, 0, 0] = True
    assert shares(covered, sizes, (0.9,)) == {"0.9": {"covered": 0.5, "mean_set_size": 3.0}}
