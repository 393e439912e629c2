"""Forecasts laid beside the truth, the experts of every layer best first: what every metric counts from.

Between forecasts and metrics, in memory only.

    specmoe evaluate gpt-oss-20b --traces test.npz
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from speculation.ranking import rank
from training.errors import ForecastInvalid


@dataclass(frozen=True, slots=True)
class Ranked:
    """Scores of N tokens and R target layers beside the truth, the E experts of a layer best first.

    scores: as forecast.
    routed: whether the expert was among the top-k.
    gate_shares: its share of the layer's gate weight, 0 where not routed; None where gates are unknown.
    best_position: rank, from 0, of the expert with the highest gate (of equal ones, in the first slot).
    """

    scores: Float[np.ndarray, "N R E"]
    routed: Bool[np.ndarray, "N R E"]
    gate_shares: Float[np.ndarray, "N R E"] | None
    best_position: Int[np.ndarray, "N R"] | None

    def from_layer(self, first: int) -> Ranked:
        """The same without the first `first` target layers."""
        return Ranked(
            self.scores[:, first:],
            self.routed[:, first:],
            None if self.gate_shares is None else self.gate_shares[:, first:],
            None if self.best_position is None else self.best_position[:, first:],
        )

    def hits(self, n: int) -> Int[np.ndarray, "N R"]:
        """How many routed experts are among the first n."""
        return np.asarray(np.count_nonzero(self.routed[..., :n], axis=-1))


def rank_against(
    scores: Float[np.ndarray, "N R E"],
    experts: Int[np.ndarray, "N R K"],
    gates: Float[np.ndarray, "N R K"] | None,
) -> Ranked:
    """Rank the experts of every layer by score, ties by lower id, and mark which were routed.

    Raises ForecastInvalid for a score that is negative or not finite.
    """
    wrong = ~((scores >= 0) & (scores < np.inf))  # NaN is neither
    if wrong.any():
        raise ForecastInvalid(
            f"{np.count_nonzero(wrong):,} of {wrong.size:,} forecast scores are negative or not finite.",
            remedy="Train the version again, or evaluate another one.",
        )
    order, ranked_scores = rank(scores, scores.shape[-1])
    routed = np.zeros(scores.shape, bool)
    np.put_along_axis(routed, experts.astype(np.int64), True, axis=-1)
    shares, best_position = None, None
    if gates is not None:
        shares, best_position = _gates_in_order(order, experts.astype(np.int64), gates)
    return Ranked(ranked_scores, np.take_along_axis(routed, order, axis=-1), shares, best_position)


def _gates_in_order(
    order: Int[np.ndarray, "N R E"], experts: Int[np.ndarray, "N R K"], gates: Float[np.ndarray, "N R K"]
) -> tuple[Float[np.ndarray, "N R E"], Int[np.ndarray, "N R"]]:
    shares = np.zeros(order.shape, np.float32)
    np.put_along_axis(shares, experts, gates / gates.sum(axis=-1, keepdims=True), axis=-1)
    best = np.take_along_axis(experts, gates.argmax(axis=-1)[..., None], axis=-1)
    return np.take_along_axis(shares, order, axis=-1), (order == best).argmax(axis=-1)
