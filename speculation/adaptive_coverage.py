"""Coverage that holds where routing drifts away from the validation split: set sizes that learn from misses.

coverage tables of the manifest + routing as it comes -> AdaptiveCoverage -> set sizes
a budget + what was fetched -> BudgetThreshold -> whom to fetch

Adaptive conformal inference (Gibbs & Candès, "Adaptive Conformal Inference Under Distribution Shift", NeurIPS
2021) moves the nominal level after each outcome by step (1 - level - miss). A manifest has tables for a few
levels, so the set's size is moved instead, which is quantile tracking (Angelopoulos, Candès & Tibshirani,
"Conformal PID Control for Time Series Prediction", NeurIPS 2023): a miss makes sets larger, each hit a little
smaller. Whatever the routing does, the share of misses over T tokens is within about 2 E / (step T) of
1 - level: what is moved is bounded, since a set of all experts misses nothing.

Knows no clock and no sequence: keep one for each sequence, or one for a stream.

    coverage = AdaptiveCoverage(speculator.manifest.coverage, speculator.spec)
    sizes = coverage.sizes[0]                      # [seen, layer], of the first level
    coverage.observe(needed_of(probabilities, routed))
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Integer

from model_store.manifest import Coverage
from speculation.coverage import coverage_size
from speculation.errors import CoverageUnknown, InputInvalid
from traces.spec import RoutingSpec

# Distances that share a correction begin here: 1, 2-3, 4-7, 8-15, from 16. Token start is a group of its own.
GROUP_BEGINS = (1, 2, 4, 8, 16)
# Experts that a set grows by where every layer of a token was missed.
STEP = 1.0
# The golden ratio's fraction spreads layers evenly over the roundings of one and the same correction.
SPREAD = (math.sqrt(5) - 1) / 2
# A threshold moves by so much in log-odds where twice the budget was fetched.
BUDGET_STEP = 0.05
LARGEST_LOG_ODDS = 16.0


class AdaptiveCoverage:
    """Set sizes by level, layers seen and target layer; those of one group of distances are moved together.

    step: experts that a group's sets grow by where a token missed all of them.
    """

    def __init__(self, coverage: Coverage, spec: RoutingSpec, *, step: float = STEP) -> None:
        if not step >= 0:
            raise InputInvalid(
                f"step is {step}, expected 0 or more.", remedy="0 leaves the tables as they are."
            )
        if not coverage.levels:
            raise CoverageUnknown(
                "This version has no coverage tables.", remedy="Ask for a number of experts instead."
            )
        self.levels = coverage.levels
        self._experts, self._step = spec.num_experts, step
        self._table = np.stack([_sizes(coverage, level, spec.num_layers) for level in self.levels])
        self._group = groups(spec.num_layers)
        self._phase = (np.arange(spec.num_layers) * SPREAD) % 1.0 if step else np.full(spec.num_layers, 0.5)
        self.correction: Float64[np.ndarray, "A G"] = np.zeros((len(self.levels), len(GROUP_BEGINS) + 1))

    @property
    def sizes(self) -> Int64[np.ndarray, "A L L"]:
        """[level, layers seen, target layer]: experts to fetch, best first; 0 where the layer was seen.

        A correction of half an expert makes half of the layers' sets larger by one.
        """
        moved = np.floor(self._table + self.correction[:, self._group] + self._phase).astype(np.int64)
        return np.where(self._table > 0, moved.clip(1, self._experts), 0)

    def observe(self, needed: Integer[np.ndarray, "L L"]) -> None:
        """Take in a token: its sets' sizes are moved by what they would have missed.

        needed: [layers seen, target layer] experts it took (`needed_of`); 0 where none was forecast.
        """
        forecast = (needed > 0) & (self._table[0] > 0)
        missed = (needed > self.sizes) & forecast
        group = self._group.ravel()
        count = np.bincount(group, forecast.ravel(), self.correction.shape[1])
        for row, level in enumerate(self.levels):
            share = np.bincount(group, missed[row].ravel(), len(count)) / np.maximum(count, 1)
            self.correction[row] += np.where(count > 0, self._step * (share - (1 - level)), 0.0)
        # Beyond it nothing would change, and the way back would take longer.
        np.clip(self.correction, -self._experts, self._experts, out=self.correction)


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
    probabilities: Float[np.ndarray, "*N E"], routed: Integer[np.ndarray, "*N K"]
) -> Int64[np.ndarray, "*N"]:
    """How many first-ranked experts it takes to have all the routed ones; ties: the lower id first."""
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    found = (order[..., None] == routed[..., None, :]).any(-1)
    needed: Int64[np.ndarray, "*N"] = found.shape[-1] - found[..., ::-1].argmax(-1)
    return needed


def groups(num_layers: int) -> Int64[np.ndarray, "L L"]:
    """[layers seen, target layer]: which correction a forecast's set follows; 0 for token start."""
    seen, layer = np.arange(num_layers)[:, None], np.arange(num_layers)
    later = np.searchsorted(GROUP_BEGINS, np.maximum(layer - seen + 1, 1), side="right")
    return np.where(seen == 0, 0, later)


def _sizes(coverage: Coverage, level: float, num_layers: int) -> Int64[np.ndarray, "L L"]:
    sizes = np.zeros((num_layers, num_layers), np.int64)
    for seen in range(num_layers):
        for layer in range(seen, num_layers):
            sizes[seen, layer] = coverage_size(coverage, level, layer, seen)
    return sizes
