"""Every metric, by hand and against slow references that count one token and one layer at a time."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.manifest import Coverage
from traces.spec import RoutingSpec
from training.errors import EvaluationError, ForecastInvalid
from training.metrics import (
    FINE_BINS,
    Metrics,
    distance_name,
    expected_calibration_error,
    reliability_bins,
)
from training.ranked import rank_against

SPEC = RoutingSpec("toy", 3, 6, 2)
COVERAGE = Coverage(
    levels=(0.9, 0.99),
    experts=(((2,), (2, 3), (2, 3, 4)), ((4,), (5, 5), (5, 6, 6))),
    thresholds=(((0.5,), (0.6, 0.4), (0.5, 0.5, 0.3)), ((0.3,), (0.2, 0.3), (0.1, 0.3, 0.2))),
)


def random_batch(seed: int, tokens: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [N, L, E] with many ties, experts [N, L, K], gates [N, L, K]."""
    rng = np.random.default_rng(seed)
    layers, experts = SPEC.num_layers, SPEC.num_experts
    probabilities = rng.integers(0, 20, (tokens, layers, experts)).astype(np.float32) / 20
    routed = rng.permuted(np.broadcast_to(np.arange(experts), (tokens, layers, experts)), axis=-1)[..., :2]
    return probabilities, routed.astype(np.int16), rng.random((tokens, layers, 2)).astype(np.float32) + 0.01


def fed(seed: int, *, batches: int = 1, gates: bool = True, **options: Any) -> Metrics:
    metrics = Metrics(SPEC, **options)
    probabilities, experts, weights = random_batch(seed)
    for part in np.array_split(np.arange(len(experts)), batches):
        for seen in range(SPEC.num_layers):
            known = weights[part, seen:] if gates else None
            ranked = rank_against(probabilities[part, seen:] * (1 - seen / 10), experts[part, seen:], known)
            metrics.add(seen, ranked)
    return metrics


def naive(seed: int, cells: list[tuple[int, int]]) -> dict[str, Any]:
    """The same scores by plain loops. cells: (seen, layer) to pool."""
    probabilities, experts, weights = random_batch(seed)
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[float, bool]] = []
    for seen, layer in cells:
        for p, routed, gates in zip(
            probabilities[:, layer] * (1 - seen / 10),
            experts[:, layer].tolist(),
            weights[:, layer],
            strict=True,
        ):
            ranking = sorted(range(6), key=lambda e: (-p[e], e))
            first, twice = ranking[:2], ranking[:4]
            share = dict(zip(routed, gates / gates.sum(), strict=True))
            best = routed[int(gates.argmax())]
            pairs += [(float(p[e]), e in routed) for e in twice]
            row = {
                "recall_at_k": np.mean([e in first for e in routed]),
                "recall_at_2k": np.mean([e in twice for e in routed]),
                "hit_at_1": ranking[0] in routed,
                "exact_set": set(first) == set(routed),
                "gate_mass_recall": sum(share.get(e, 0) for e in first),
                "brier": np.mean([(p[e] - (e in routed)) ** 2 for e in range(6)]),
            }
            row |= {f"top {n}": best in ranking[:n] for n in (1, 3, 5, 10)}
            for i, level in enumerate(COVERAGE.levels):
                threshold = np.float32(COVERAGE.thresholds[i][layer][layer - seen])
                size = max(COVERAGE.experts[i][layer][layer - seen], int((p >= threshold).sum()))
                row |= {f"covered {level}": set(routed) <= set(ranking[:size]), f"size {level}": size}
            rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} | {"pairs": pairs}


def flat(scores: dict[str, Any]) -> dict[str, float]:
    plain = {k: v for k, v in scores.items() if isinstance(v, float) and k != "ece"}
    plain |= {f"top {n}": v for n, v in scores["top_n_accuracy"].items()}
    for level, held in scores["coverage"].items():
        plain |= {f"covered {level}": held["covered"], f"size {level}": held["mean_set_size"]}
    return plain


CELLS = {
    "start": [(0, 0), (0, 1), (0, 2)],
    "1": [(1, 1), (2, 2)],
    "2": [(1, 2)],
}


@pytest.mark.parametrize("distance", CELLS)
@pytest.mark.parametrize("seed", range(3))
def test_scores_by_distance_are_those_of_plain_loops(distance: str, seed: int) -> None:
    expected = naive(seed, CELLS[distance])
    del expected["pairs"]
    assert flat(fed(seed, coverage=COVERAGE).distances()[distance]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("layer", range(3))
def test_scores_by_layer_pool_every_number_of_seen_layers(layer: int) -> None:
    expected = naive(0, [(seen, layer) for seen in range(layer + 1)])
    del expected["pairs"]
    assert flat(fed(0, coverage=COVERAGE).layers()[layer]) == pytest.approx(expected, abs=1e-6)


def test_scores_by_layer_and_distance_are_those_of_plain_loops() -> None:
    expected = naive(0, [(1, 2)])
    del expected["pairs"]
    table = fed(0, coverage=COVERAGE).by_layer_and_distance()
    assert flat(table["2"]["2"]) == pytest.approx(expected, abs=1e-6)
    assert {distance: list(row) for distance, row in table.items()} == {
        "start": ["0", "1", "2"],
        "1": ["1", "2"],
        "2": ["2"],
    }


def test_batches_add_up_to_the_whole() -> None:
    whole, parts = fed(0, coverage=COVERAGE), fed(0, coverage=COVERAGE, batches=7)
    for distance, scores in whole.distances().items():
        assert flat(parts.distances()[distance]) == pytest.approx(flat(scores), abs=1e-6)


def test_hand_worked_example() -> None:
    spec = RoutingSpec("hand", 1, 4, 2)
    metrics = Metrics(spec)
    scores = np.array([[[0.9, 0.6, 0.3, 0.2]], [[0.5, 0.5, 0.5, 0.5]]], np.float32)
    experts = np.array([[[2, 0]], [[3, 1]]])  # ranked 0 1 2 3 twice: ties go by id
    gates = np.array([[[3.0, 1.0]], [[1.0, 1.0]]], np.float32)
    metrics.add(0, rank_against(scores, experts, gates))
    start = metrics.distances()["start"]
    assert start["recall_at_k"] == 0.5
    assert start["hit_at_1"] == 0.5
    assert start["gate_mass_recall"] == pytest.approx((0.25 + 0.5) / 2)
    assert start["top_n_accuracy"] == {"1": 0.0, "3": 0.5, "5": 1.0, "10": 1.0}
    assert start["brier"] == pytest.approx(((0.01 + 0.36 + 0.49 + 0.04) / 4 + 0.25) / 2, abs=1e-6)


def test_of_two_equal_gates_the_first_slot_is_the_highest() -> None:
    ranked = rank_against(
        np.array([[[0.9, 0.6, 0.3, 0.2]]], np.float32), np.array([[[1, 0]]]), np.ones((1, 1, 2), np.float32)
    )
    assert ranked.best_position is not None and ranked.best_position.tolist() == [[1]]


def test_gate_scores_are_unknown_without_gates() -> None:
    start = fed(0, gates=False).distances()["start"]
    assert start["gate_mass_recall"] is None and start["top_n_accuracy"] is None


def test_scores_that_only_rank_have_no_calibration() -> None:
    metrics = fed(0, probabilities=False, coverage=COVERAGE)
    start = metrics.distances()["start"]
    assert [start[name] for name in ("ece", "brier", "coverage")] == [None, None, None]
    assert metrics.reliability() == {}


def exact_calibration_error(confidence: np.ndarray, outcome: np.ndarray, bins: int = 15) -> float:
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, bins)
    return sum(abs((confidence[part] - outcome[part]).sum()) for part in parts) / len(order)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bend", [0.5, 1.0, 2.0], ids=["too shy", "honest", "too bold"])
def test_the_calibration_error_is_nearly_the_exact_one(bend: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = RoutingSpec("toy", 1, 16, 4)
    truth = rng.beta(0.4, 1.2, (5000, 1, 16))
    # Exactly k are routed: the likeliest four of independent draws.
    experts = np.argsort(-(truth + 0.3 * rng.random(truth.shape)), axis=-1)[..., :4]
    scores = (truth**bend).astype(np.float32)
    metrics = Metrics(spec)
    metrics.add(0, rank_against(scores, experts, None))
    routed = np.zeros(scores.shape, bool)
    np.put_along_axis(routed, experts, True, axis=-1)
    first = np.argsort(-scores, axis=-1, kind="stable")[..., :8]
    exact = exact_calibration_error(
        np.take_along_axis(scores, first, -1).ravel().astype(np.float64),
        np.take_along_axis(routed, first, -1).ravel(),
    )
    assert metrics.distances()["start"]["ece"] == pytest.approx(exact, abs=1e-3)


def test_honest_probabilities_have_next_to_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    fine = np.minimum((confidence * FINE_BINS).astype(int), FINE_BINS - 1)
    outcome = rng.random(200_000) < confidence
    sums = [np.bincount(fine, weights, FINE_BINS) for weights in (None, confidence, outcome)]
    assert expected_calibration_error(reliability_bins(np.stack(sums, axis=1))) < 0.005


def test_reliability_bins_are_of_nearly_equal_mass() -> None:
    counts = np.random.default_rng(0).integers(0, 50, FINE_BINS).astype(float)
    bins = reliability_bins(np.stack([counts, counts * 0.5, counts * 0.5], axis=1))
    assert [b["share"] for b in bins] == pytest.approx([1 / 15] * 15, abs=2 * 50 / counts.sum())


@given(st.lists(st.integers(0, 5), min_size=FINE_BINS, max_size=FINE_BINS))
@settings(max_examples=20, deadline=None)
def test_reliability_bins_lose_nothing(counts: list[int]) -> None:
    column = np.array(counts, float)
    bins = reliability_bins(np.stack([column, column * 0.25, column * 0.75], axis=1))
    assert sum(b["share"] for b in bins) == pytest.approx(1.0 if sum(counts) else 0.0)


def test_distances_count_from_the_last_seen_layer() -> None:
    assert [distance_name(3, seen) for seen in (0, 1, 3)] == ["start", "3", "1"]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.5])
def test_scores_that_are_no_numbers_from_zero_are_refused(wrong: float) -> None:
    probabilities, experts, _ = random_batch(0)
    probabilities[3, 1, 2] = wrong
    with pytest.raises(ForecastInvalid, match="1 of 720 forecast scores are negative or not finite"):
        rank_against(probabilities, experts, None)


def test_no_token_scored_is_refused() -> None:
    with pytest.raises(EvaluationError, match="No token was scored"):
        Metrics(SPEC).distances()
