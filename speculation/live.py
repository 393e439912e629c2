"""How good forecasts turn out to be, counted while they are served: routing is the truth for earlier ones.

Slots' forecasts of one token, then what it was routed to -> LiveScores -> a report by distance

The same scores as evaluation's (docs/evaluation.md), but counted once and forgotten: no routing is kept.
Calibration is counted in bins of equal width here, since bins of equal mass need all values at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer

from speculation.coverage import CoverageSets, sizes_of
from speculation.ranking import rank
from traces.spec import RoutingSpec

Rows: TypeAlias = Int64[np.ndarray, "R"]

BINS = 15
# Columns of the counts.
LAYERS, IN_K, IN_2K, FIRST = range(4)


class LiveScores:
    """Counts by distance. Row 0 is the start of a token, row d a target d layers ahead of the last one seen.

    sets: by coverage level.
    """

    def __init__(self, spec: RoutingSpec, sets: Mapping[float, CoverageSets]) -> None:
        rows = spec.num_layers
        self._spec, self._sets = spec, dict(sets)
        self._numbers = np.arange(rows)
        self.tokens = 0
        self.forecasts = 0
        self._counts = np.zeros((rows, 4), np.int64)
        self._covered = {level: np.zeros(rows, np.int64) for level in self._sets}
        self._in_bin = np.zeros((rows, BINS))
        self._expected = np.zeros((rows, BINS))
        self._routed = np.zeros((rows, BINS))

    def add(
        self,
        forecasts: Sequence[tuple[int, Float32[np.ndarray, "L E"]]],
        routing: Integer[np.ndarray, "L K"],
    ) -> None:
        """The forecasts of one token, each with the layers seen, and what all its layers were routed to."""
        spec = self._spec
        truth = np.zeros(spec.num_layers * spec.num_experts, bool)
        truth[(self._numbers[:, None] * spec.num_experts + routing).ravel()] = True
        layer = np.concatenate([self._numbers[first:] for first, _ in forecasts])
        firsts = np.array([first for first, _ in forecasts])
        seen = np.repeat(firsts, spec.num_layers - firsts)
        p = np.concatenate([probabilities[first:] for first, probabilities in forecasts])  # R E
        experts, ranked = rank(p, spec.num_experts)
        found = truth[layer[:, None] * spec.num_experts + experts]  # best first
        distance = np.where(seen, layer - seen + 1, 0)
        self._count_found(distance, found)
        self._count_covered(distance, seen, layer, ranked, found)
        self._count_calibration(distance, ranked[:, : 2 * spec.top_k], found)
        self.tokens += 1
        self.forecasts += len(forecasts)

    def _count_found(self, distance: Rows, found: Bool[np.ndarray, "R E"]) -> None:
        top_k = self._spec.top_k
        ones = np.ones(len(found), np.int64)
        columns = (ones, found[:, :top_k].sum(1), found[:, : 2 * top_k].sum(1), found[:, 0])
        for column, values in enumerate(columns):
            self._counts[:, column] += np.bincount(distance, values, len(self._counts)).astype(np.int64)

    def _count_covered(
        self,
        distance: Rows,
        seen: Rows,
        layer: Rows,
        ranked: Float32[np.ndarray, "R E"],
        found: Bool[np.ndarray, "R E"],
    ) -> None:
        # Rank of the routed expert that was ranked last: a set that is at least so large holds all of them.
        needed = found.shape[1] - np.argmax(found[:, ::-1], axis=1)
        for level, sets in self._sets.items():
            held = needed <= sizes_of(sets.least[seen, layer], sets.threshold[seen, layer], ranked)
            self._covered[level] += np.bincount(distance, held, len(self._counts)).astype(np.int64)

    def _count_calibration(
        self, distance: Rows, p: Float32[np.ndarray, "R n"], found: Bool[np.ndarray, "R E"]
    ) -> None:
        bins = np.minimum((p * BINS).astype(np.int64), BINS - 1)
        cells = (distance[:, None] * BINS + bins).ravel()
        for cell_sums, weights in (
            (self._in_bin, np.ones(p.size)),
            (self._expected, p.ravel()),
            (self._routed, found[:, : p.shape[1]].ravel()),
        ):
            cell_sums += np.bincount(cells, weights, cell_sums.size).reshape(cell_sums.shape)

    def report(self) -> dict[str, dict[str, Any]]:
        """By distance "start", "1", ...: what was counted, and the scores; only those that have a target."""
        names = ["start", *map(str, range(1, len(self._counts)))]
        return {name: self._scores(row) for row, name in enumerate(names) if self._counts[row, LAYERS]}

    def _scores(self, row: int) -> dict[str, Any]:
        layers, in_k, in_2k, first = self._counts[row].tolist()
        listed = int(self._in_bin[row].sum())
        gap = float(np.abs(self._expected[row] - self._routed[row]).sum())
        return {
            "layers": layers,
            "recall_at_k": in_k / (layers * self._spec.top_k),
            "recall_at_2k": in_2k / (layers * self._spec.top_k),
            "hit_at_1": first / layers,
            "ece": gap / listed,
            "coverage": {str(level): int(covered[row]) / layers for level, covered in self._covered.items()},
        }
