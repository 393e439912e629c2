"""Coverage that holds where routing drifts away from the validation split: thresholds that learn from misses.

coverage sets of the manifest + routing as it comes -> AdaptiveCoverage -> coverage sets
a budget + what was fetched -> BudgetThreshold -> whom to fetch

Adaptive conformal inference (Gibbs & Candès, "Adaptive Conformal Inference Under Distribution Shift", NeurIPS
2021) moves the nominal level after each outcome by step (1 - level - miss). A manifest has tables for a few
levels, so the threshold is moved instead, in log-odds, which is quantile tracking (Angelopoulos, Candès &
Tibshirani, "Conformal PID Control for Time Series Prediction", NeurIPS 2023): a miss lowers it, each hit
raises it a little. Whatever the routing does, the share of misses over T tokens is above 1 - level by at most
some 2 C / (step T): what is moved is bounded by C log-odds, where a set has all experts and misses nothing.
(It may stay below: the first-ranked K are in every set.)

Knows no clock and no sequence: keep one for each sequence, or one for a stream.

    coverage = AdaptiveCoverage(speculator)
    sizes = coverage.sizes(probabilities, seen)[0]           # by layer, of the first level
    coverage.observe([(seen, probabilities)], routed)        # once the token is finished
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer

from speculation.coverage import CoverageSets, level_number, sizes_of
from speculation.errors import CoverageUnknown, InputInvalid
from speculation.runtime import Speculator

# Distances that share a correction begin here: 1, 2-3, 4-7, 8-15, from 16. Token start is a group of its own.
GROUP_BEGINS = (1, 2, 4, 8, 16)
# Log-odds that a threshold falls by where every layer of a token was missed.
STEP = 0.8
# A threshold moves by so much in log-odds where twice the budget was fetched.
BUDGET_STEP = 0.05
LARGEST_LOG_ODDS = 16.0


class AdaptiveCoverage:
    """Set sizes by level and layer; the thresholds of one group of distances are moved together.

    levels: of the manifest; all of them unless some are named. correction: by level and group, what
    thresholds are lower by, in log-odds.
    step: log-odds that a group's thresholds fall by where a token missed all of them; 0 leaves them.
    Raises CoverageUnknown where the version's sets have no thresholds, or none of a level that is named.
    """

    def __init__(
        self, speculator: Speculator, *, levels: Sequence[float] | None = None, step: float = STEP
    ) -> None:
        if not step >= 0:
            raise InputInvalid(
                f"step is {step}, expected 0 or more.", remedy="0 leaves the thresholds as they are."
            )
        coverage = speculator.manifest.coverage
        if not coverage.levels or not coverage.thresholds:
            raise CoverageUnknown(
                f"{speculator.origin} has no thresholds that could be moved.",
                remedy="Take a newer version, or export and publish this one again.",
            )
        if levels is None:
            self.levels = coverage.levels
        else:
            self.levels = tuple(coverage.levels[level_number(coverage, level)] for level in levels)
        self._step = step
        sets = [speculator.coverage_sets(level) for level in self.levels]
        self._least = np.stack([s.least for s in sets])  # [level, layers seen, target layer]
        self._threshold = np.stack([s.threshold for s in sets])
        self._log_odds = _log_odds(self._threshold.astype(np.float64))
        self._group = groups(speculator.spec.num_layers)
        self.correction: Float64[np.ndarray, "A G"] = np.zeros((len(self.levels), len(GROUP_BEGINS) + 1))
        self._moved = self._threshold

    def sets(self, number: int) -> CoverageSets:
        """Those of a level as they are now. number: its place among the levels."""
        return CoverageSets(self._least[number], self._moved[number])

    def sizes(
        self, probabilities: Float32[np.ndarray, "*B L E"], seen: int | Integer[np.ndarray, "*B"]
    ) -> Int64[np.ndarray, "A *B L"]:
        """How many first-ranked experts to fetch, by level and layer; 0 where the layer was seen."""
        return sizes_of(self._least[:, seen], self._moved[:, seen], probabilities[None])

    def thresholds(self) -> Float32[np.ndarray, "A L L"]:
        """[level, layers seen, target layer]: whoever is at least so probable is to be fetched."""
        return self._moved

    def _corrected(self) -> Float32[np.ndarray, "A L L"]:
        by_layer = self.correction[:, self._group]
        moved = 1 / (1 + np.exp(np.minimum(by_layer - self._log_odds, 700.0)))
        moved = np.where(by_layer >= LARGEST_LOG_ODDS, 0.0, moved)  # at the end, nobody is left out
        # Untouched, they are the manifest's to the last bit; a layer that was seen has no set.
        as_published = (by_layer == 0) | (self._least == 0)
        return np.where(as_published, self._threshold, moved).astype(np.float32)

    def observe(
        self,
        forecasts: Sequence[tuple[int, Float32[np.ndarray, "L E"]]],
        routing: Integer[np.ndarray, "L K"],
    ) -> None:
        """Take in a finished token: thresholds are moved by what its sets would have missed.

        forecasts: those that were made of it, each with the layers seen. routing: what it was routed to.
        """
        if not forecasts:
            return
        seen = np.array([number for number, _ in forecasts])
        probabilities = np.stack([p for _, p in forecasts])
        routed = routing[None].repeat(len(seen), 0).astype(np.int64)
        # Who is missed is neither probable enough nor among the first-ranked.
        improbable = _least_of(probabilities, routed) < self._moved[:, seen]
        self.move(seen, improbable & (needed_of(probabilities, routed) > self._least[:, seen]))

    def move(self, seen: Int64[np.ndarray, "F"], missed: Bool[np.ndarray, "A F L"]) -> None:
        """The same, where it is known which sets missed a routed expert; of layers seen: no matter."""
        layers = np.arange(missed.shape[-1])
        forecast = layers >= seen[:, None]
        group = self._group[seen][forecast]
        count = np.bincount(group, minlength=self.correction.shape[1])
        for row, level in enumerate(self.levels):
            share = np.bincount(group, missed[row][forecast], len(count)) / np.maximum(count, 1)
            self.correction[row] += np.where(count > 0, self._step * (share - (1 - level)), 0.0)
        # Beyond it nothing would change, and the way back would take longer.
        np.clip(self.correction, -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS, out=self.correction)
        self._moved = self._corrected()


class BudgetThreshold:
    """A threshold on probability that, on average, lets through as many experts a layer as the budget allows.

    Moves in log-odds after each token, by step (fetched / budget - 1).
    budget: experts a layer. threshold: what to begin with.
    """

    def __init__(self, budget: float, *, threshold: float = 0.5, step: float = BUDGET_STEP) -> None:
        if not budget > 0 or not 0 < threshold < 1 or not step >= 0:
            raise InputInvalid(
                f"budget is {budget}, threshold {threshold}, step {step}, expected a budget above 0, a "
                "threshold between 0 and 1, a step from 0.",
                remedy="Give the mean number of experts to fetch for a layer.",
            )
        self._budget, self._step = budget, step
        self._log_odds = math.log(threshold / (1 - threshold))

    @property
    def threshold(self) -> float:
        """Fetch what is at least so probable."""
        return 1 / (1 + math.exp(-self._log_odds))

    def chosen(self, probabilities: Float[np.ndarray, "*N E"]) -> Bool[np.ndarray, "*N E"]:
        """Which experts to fetch."""
        return probabilities >= self.threshold

    def observe(self, fetched: float) -> None:
        """Take in a token. fetched: mean experts a layer; what was resident anyway need not be counted."""
        self._log_odds += self._step * (fetched / self._budget - 1)
        self._log_odds = min(max(self._log_odds, -LARGEST_LOG_ODDS), LARGEST_LOG_ODDS)


def budget_of(bytes_per_token: float, expert_bytes: float, num_layers: int) -> float:
    """Experts a layer that may be fetched where a token may take so many bytes over the link."""
    if not bytes_per_token > 0 or not expert_bytes > 0:
        raise InputInvalid(
            f"{bytes_per_token} bytes a token and {expert_bytes} an expert, expected more than 0 each.",
            remedy="Give what the link carries during a token, and the size of one expert's weights.",
        )
    return bytes_per_token / (expert_bytes * num_layers)


def needed_of(
    probabilities: Float[np.ndarray, "*N E"], routed: Int64[np.ndarray, "*N K"]
) -> Int64[np.ndarray, "*N"]:
    """How many first-ranked experts it takes to have all the routed ones; ties: the lower id first."""
    of_routed = np.take_along_axis(probabilities, routed, axis=-1)
    least = of_routed.min(-1, keepdims=True)
    last = np.where(of_routed == least, routed, -1).max(-1, keepdims=True)
    as_probable = (probabilities == least) & (np.arange(probabilities.shape[-1]) <= last)
    needed: Int64[np.ndarray, "*N"] = np.count_nonzero((probabilities > least) | as_probable, axis=-1)
    return needed


def _least_of(
    probabilities: Float[np.ndarray, "*N E"], routed: Int64[np.ndarray, "*N K"]
) -> Float[np.ndarray, "*N"]:
    """The probability of the routed expert that was least probable."""
    least: Float[np.ndarray, "*N"] = np.take_along_axis(probabilities, routed, axis=-1).min(-1)
    return least


def groups(num_layers: int) -> Int64[np.ndarray, "L L"]:
    """[layers seen, target layer]: which correction a forecast's set follows; 0 for token start."""
    seen, layer = np.arange(num_layers)[:, None], np.arange(num_layers)
    later = np.searchsorted(GROUP_BEGINS, np.maximum(layer - seen + 1, 1), side="right")
    return np.where(seen == 0, 0, later)


def _log_odds(p: Float64[np.ndarray, "*N"]) -> Float64[np.ndarray, "*N"]:
    """Of probabilities; certainties end at a number that sums well."""
    inside = np.clip(p, 1e-12, 1 - 1e-12)
    odds: Float64[np.ndarray, "*N"] = np.log(inside / (1 - inside))
    return odds
