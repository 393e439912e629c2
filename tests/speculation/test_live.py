"""LiveScores count what plain loops count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.coverage import CoverageSets
from speculation.live import BINS, LiveScores
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC

LAYERS, EXPERTS, K = TOY_SPEC.num_layers, TOY_SPEC.num_experts, TOY_SPEC.top_k
LEVELS = (0.5, 0.9)
SETS = {
    level: CoverageSets(
        np.random.default_rng(number).integers(K, EXPERTS + 1, (LAYERS, LAYERS)),
        np.random.default_rng(number).random((LAYERS, LAYERS), np.float32),
    )
    for number, level in enumerate(LEVELS)
}
Forecast = tuple[int, np.ndarray[Any, Any]]


def naive(tokens: list[tuple[list[Forecast], np.ndarray[Any, Any]]]) -> dict[str, dict[str, Any]]:
    """The report, target by target."""
    targets: dict[str, list[tuple[int, int, np.ndarray[Any, Any], set[int]]]] = {}
    for forecasts, routing in tokens:
        for seen, probabilities in forecasts:
            for layer in range(seen, LAYERS):
                distance = "start" if seen == 0 else str(layer - seen + 1)
                target = (seen, layer, probabilities[layer], set(routing[layer].tolist()))
                targets.setdefault(distance, []).append(target)
    return {distance: naive_scores(of_it) for distance, of_it in targets.items()}


def naive_scores(targets: list[tuple[int, int, np.ndarray[Any, Any], set[int]]]) -> dict[str, Any]:
    in_k = in_2k = first = 0
    covered = dict.fromkeys(LEVELS, 0)
    gaps, listed = [0.0] * BINS, 0
    for seen, layer, p, truth in targets:
        order = sorted(range(EXPERTS), key=lambda expert: (-p[expert], expert))
        in_k += len(truth & set(order[:K]))
        in_2k += len(truth & set(order[: 2 * K]))
        first += order[0] in truth
        for level in LEVELS:
            sets = SETS[level]
            probable = [expert for expert in order if p[expert] >= sets.threshold[seen, layer]]
            covered[level] += truth <= {*order[: sets.least[seen, layer]], *probable}
        for expert in order[: 2 * K]:
            gaps[min(int(p[expert] * BINS), BINS - 1)] += float(p[expert]) - (expert in truth)
            listed += 1
    count = len(targets)
    return {
        "layers": count,
        "recall_at_k": in_k / (count * K),
        "recall_at_2k": in_2k / (count * K),
        "hit_at_1": first / count,
        "ece": sum(map(abs, gaps)) / listed,
        "coverage": {str(level): covered[level] / count for level in LEVELS},
    }


def made_up(seed: int, seen: list[int]) -> tuple[list[Forecast], np.ndarray[Any, Any]]:
    """Forecasts after so many layers, and what the token was routed to."""
    rng = np.random.default_rng(seed)
    _, experts, _ = routed(seed, 1, TOY_SPEC, seen=LAYERS)
    # Coarse, so that ties and the edges of bins come up.
    forecasts = [(n, (rng.integers(0, 31, (LAYERS, EXPERTS)) / 30).astype(np.float32)) for n in seen]
    return forecasts, experts[0].astype(np.uint8)


token = st.tuples(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True).map(sorted),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(token, min_size=1, max_size=5))
def test_scores_are_what_plain_loops_count(tokens: list[tuple[int, list[int]]]) -> None:
    scores = LiveScores(TOY_SPEC, SETS)
    made = [made_up(*token) for token in tokens]
    for forecasts, routing in made:
        scores.add(forecasts, routing)
    report, expected = scores.report(), naive(made)
    assert report.keys() == expected.keys()
    for distance, counted in report.items():
        assert counted.pop("coverage") == pytest.approx(expected[distance].pop("coverage"))
        assert counted == pytest.approx(expected[distance], abs=1e-6)
    assert (scores.tokens, scores.forecasts) == (len(tokens), sum(len(seen) for _, seen in tokens))


def test_a_perfect_forecast_scores_1_and_has_no_gap() -> None:
    _, experts, _ = routed(1, 1, TOY_SPEC, seen=LAYERS)
    certain = np.zeros((LAYERS, EXPERTS), np.float32)
    np.put_along_axis(certain, experts[0].astype(np.int64), 1.0, axis=1)
    scores = LiveScores(TOY_SPEC, SETS)
    scores.add([(seen, certain) for seen in range(LAYERS)], experts[0])
    for counted in scores.report().values():
        assert (counted["recall_at_k"], counted["recall_at_2k"], counted["hit_at_1"]) == (1.0, 1.0, 1.0)
        assert (counted["ece"], set(counted["coverage"].values())) == (0.0, {1.0})


def test_a_forecast_that_is_right_half_the_time_it_says_so_is_calibrated() -> None:
    half = np.full((LAYERS, EXPERTS), 0.5, np.float32)
    scores = LiveScores(TOY_SPEC, {})
    # Of the first four experts, the listed ones, two are routed.
    scores.add([(0, half)], np.tile([0, 1], (LAYERS, 1)))
    assert scores.report()["start"]["ece"] == 0.0
    scores.add([(0, half)], np.tile([6, 7], (LAYERS, 1)))
    assert scores.report()["start"]["ece"] == pytest.approx(0.25)


def test_distances_without_a_target_are_left_out() -> None:
    scores = LiveScores(TOY_SPEC, {})
    assert scores.report() == {}
    scores.add(*made_up(1, [2]))
    assert {name: row["layers"] for name, row in scores.report().items()} == {"1": 1, "2": 1}
