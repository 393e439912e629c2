"""How good ranked experts are: recall, hits, exact sets, gate mass, calibration, coverage.

Between ranked forecasts and reports: `Metrics` adds batches up in bounded memory (millions of tokens) and
tells the scores by distance, by layer, and by both.

    specmoe evaluate gpt-oss-20b --traces test.npz
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from model_store.manifest import Coverage
from speculation.coverage import CoverageSets, all_sets, sizes_of
from traces.spec import RoutingSpec
from training.errors import EvaluationError
from training.ranked import Ranked

START = "start"
TOP_N = (1, 3, 5, 10)
CALIBRATION_BINS = 15
# Confidences are kept in this many fine bins, equally wide in arcsin(sqrt(p)), where a frequency is equally
# uncertain everywhere; bins of equal mass are cut from them. 24 kB for each pair of layer and distance.
FINE_BINS = 1024

Sums = dict[str, np.ndarray]


class Metrics:
    """Adds up how forecasts did, for every number of seen layers and every target layer.

    probabilities: whether scores are probabilities; only then is there an ECE, a Brier score and a coverage.
    coverage: which experts make a set, as in a version's manifest; without it no coverage is scored.
    """

    def __init__(
        self, spec: RoutingSpec, *, coverage: Coverage | None = None, probabilities: bool = True
    ) -> None:
        self.spec = spec
        self._levels = coverage.levels if coverage and probabilities else ()
        self._sets = all_sets(coverage, spec.num_layers) if coverage and probabilities else ()
        self._probabilities = probabilities
        self._sums: list[Sums] = [{} for _ in range(spec.num_layers)]  # by seen; arrays [L - seen, ...]

    def add(self, seen: int, ranked: Ranked) -> None:
        """Add tokens of which layers 0 .. seen-1 were known; `ranked` holds the target layers seen .. L-1."""
        sums = _sum_hits(ranked, self.spec.top_k)
        if ranked.gate_shares is not None and ranked.best_position is not None:
            sums |= _sum_gates(ranked.gate_shares, ranked.best_position, self.spec.top_k)
        if self._probabilities:
            sums |= _sum_probabilities(ranked, self.spec.top_k)
        if self._sets:
            sums |= _sum_coverage(ranked, seen, self._sets)
        self._sums[seen] = _total([self._sums[seen], sums])

    def distances(self) -> dict[str, dict[str, Any]]:
        """Scores by distance: "start" pools every layer of a token of which none was seen, "d" every target
        layer d ahead of the last seen one. None is a score that cannot be known: no gates, no probabilities.
        """
        return {distance: self._scores(sums) for distance, sums in self._pooled_by_distance().items()}

    def layers(self) -> list[dict[str, Any]]:
        """Scores of every target layer, over all distances and the token start."""
        return [
            self._scores(_total(_row(sums, layer - seen) for seen, sums in self._cells(layer)))
            for layer in range(self.spec.num_layers)
        ]

    def by_layer_and_distance(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Scores by distance and, in it, by target layer. Pairs that cannot be are left out."""
        table: dict[str, dict[str, dict[str, Any]]] = {}
        for layer in range(self.spec.num_layers):
            for seen, sums in self._cells(layer):
                row = table.setdefault(distance_name(layer, seen), {})
                row[str(layer)] = self._scores(_row(sums, layer - seen))
        return {distance: table[distance] for distance in self._pooled_by_distance()}

    def reliability(self) -> dict[str, list[dict[str, float]]]:
        """By distance, the bins behind the ECE: mean probability, share that was routed, share of all."""
        if not self._probabilities:
            return {}
        return {d: reliability_bins(sums["confidence"]) for d, sums in self._pooled_by_distance().items()}

    def _cells(self, layer: int) -> list[tuple[int, Sums]]:
        return [(seen, sums) for seen, sums in enumerate(self._sums[: layer + 1]) if sums]

    def _pooled_by_distance(self) -> dict[str, Sums]:
        layers = self.spec.num_layers
        pooled = {START: _row(self._sums[0], slice(None))} if self._sums[0] else {}
        for distance in range(1, layers):
            cells = [_row(sums, distance - 1) for sums in self._sums[1 : layers - distance + 1] if sums]
            if cells:
                pooled[str(distance)] = _total(cells)
        if not pooled:
            raise EvaluationError("No token was scored.", remedy="Evaluate on a trace that has tokens.")
        return pooled

    def _scores(self, sums: Sums) -> dict[str, Any]:
        return _scores(sums, self.spec, self._levels)


def distance_name(layer: int, seen: int) -> str:
    """How far ahead target layer `layer` is once `seen` layers are known: "start", "1", "2", ..."""
    return START if seen == 0 else str(layer - seen + 1)


def reliability_bins(
    confidence: Float[np.ndarray, "F 3"], bins: int = CALIBRATION_BINS
) -> list[dict[str, float]]:
    """Cut fine bins (count, sum of probabilities, sum of outcomes) into `bins` of nearly equal mass.

    A fine bin is never cut: it goes where its middle lies. Empty bins are left out.
    """
    counts = confidence[:, 0]
    total = counts.sum()
    group = ((np.cumsum(counts) - counts / 2) * bins / max(total, 1)).astype(np.int64).clip(max=bins - 1)
    merged = np.stack([np.bincount(group, column, bins) for column in confidence.T], axis=1)
    return [
        {"probability": float(p / n), "routed": float(y / n), "share": float(n / total)}
        for n, p, y in merged
        if n
    ]


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """Mean gap between probability and outcome over the bins (Naeini et al., AAAI 2015; equal mass here)."""
    return sum(b["share"] * abs(b["probability"] - b["routed"]) for b in bins)


def _sum_hits(ranked: Ranked, top_k: int) -> Sums:
    hits = ranked.hits(top_k)
    return {
        "tokens": np.full(hits.shape[1], len(hits)),
        "hits_k": hits.sum(axis=0),
        "hits_2k": ranked.hits(2 * top_k).sum(axis=0),
        "first": np.count_nonzero(ranked.routed[..., 0], axis=0),
        "exact": np.count_nonzero(hits == top_k, axis=0),
    }


def _sum_gates(shares: Float[np.ndarray, "N R E"], best: Int[np.ndarray, "N R"], top_k: int) -> Sums:
    return {
        "gated": np.full(best.shape[1], len(best)),
        "gate_mass": shares[..., :top_k].sum(axis=(0, 2), dtype=np.float64),
        "top_n": np.stack([np.count_nonzero(best < n, axis=0) for n in TOP_N], axis=1),
    }


def _sum_probabilities(ranked: Ranked, top_k: int) -> Sums:
    """The Brier score takes every expert, the ECE the first 2k: the rest are near 0 and would flatter it."""
    error = np.square(ranked.scores - ranked.routed).mean(axis=-1)
    first = np.clip(ranked.scores[..., : 2 * top_k], 0.0, 1.0)
    outcome = ranked.routed[..., : 2 * top_k]
    layers = first.shape[1]
    fine = (np.arcsin(np.sqrt(first)) * (2 / np.pi * FINE_BINS)).astype(np.int64).clip(max=FINE_BINS - 1)
    index = (fine + np.arange(layers)[:, None] * FINE_BINS).ravel()
    columns = [
        np.bincount(index, weights, layers * FINE_BINS) for weights in (None, first.ravel(), outcome.ravel())
    ]
    return {
        "brier": error.sum(axis=0, dtype=np.float64),
        "confidence": np.stack(columns, axis=1).reshape(layers, FINE_BINS, 3).astype(np.float64),
    }


def _sum_coverage(ranked: Ranked, seen: int, sets: Sequence[CoverageSets]) -> Sums:
    # Rank, from 1, of the routed expert that was ranked last.
    needed = ranked.routed.shape[-1] - ranked.routed[..., ::-1].argmax(axis=-1)
    sizes = [sizes_of(s.least[seen, seen:], s.threshold[seen, seen:], ranked.scores) for s in sets]
    return {
        "covered": np.stack([np.count_nonzero(needed <= size, axis=0) for size in sizes], axis=1),
        "set_size": np.stack([size.sum(axis=0) for size in sizes], axis=1),
    }


def _row(sums: Sums, layers: int | slice) -> Sums:
    """The sums of one target layer, or of several added up."""
    if isinstance(layers, int):
        return {name: values[layers] for name, values in sums.items()}
    return {name: values[layers].sum(axis=0) for name, values in sums.items()}


def _total(parts: Iterable[Sums]) -> Sums:
    total: Sums = {}
    for part in parts:
        for name, values in part.items():
            total[name] = total[name] + values if name in total else values
    return total


def _scores(sums: Sums, spec: RoutingSpec, levels: Sequence[float]) -> dict[str, Any]:
    tokens, gated = int(sums["tokens"]), int(sums.get("gated", 0))
    known = "brier" in sums
    return {
        "token_layers": tokens,
        "recall_at_k": float(sums["hits_k"] / (tokens * spec.top_k)),
        "recall_at_2k": float(sums["hits_2k"] / (tokens * spec.top_k)),
        "hit_at_1": float(sums["first"] / tokens),
        "exact_set": float(sums["exact"] / tokens),
        "gate_mass_recall": float(sums["gate_mass"] / gated) if gated else None,
        "top_n_accuracy": (
            {str(n): float(hits / gated) for n, hits in zip(TOP_N, sums["top_n"], strict=True)}
            if gated
            else None
        ),
        "ece": expected_calibration_error(reliability_bins(sums["confidence"])) if known else None,
        "brier": float(sums["brier"] / tokens) if known else None,
        "coverage": (
            {
                f"{level:g}": {"covered": float(covered / tokens), "mean_set_size": float(size / tokens)}
                for level, covered, size in zip(levels, sums["covered"], sums["set_size"], strict=True)
            }
            if "covered" in sums
            else None
        ),
    }
