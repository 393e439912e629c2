"""Which experts to fetch so that with a given probability all the routed ones are among them.

A level's set of a layer: the first-ranked experts, as many as the manifest says, and whoever is at least as
probable as it says. So a sure forecast makes a small set, an unsure one a large one. Both numbers were found
on validation routing (`training.survey`); here they are only looked up.

    sets = speculator.coverage_sets(0.95)
    sizes = sets.sizes(probabilities, seen)     # how many of the ranked experts, by layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer

from model_store.manifest import Coverage
from speculation.errors import CoverageUnknown

# More than any probability: nobody is in a set for it alone.
NOBODY = 2.0


@dataclass(frozen=True, slots=True)
class CoverageSets:
    """The sets of one level, by layers seen and target layer.

    least: first-ranked experts that are in it anyway; 0 where the layer was seen, which has no set.
    threshold: whoever is at least so probable is in it, too.
    """

    least: Int64[np.ndarray, "L L"]
    threshold: Float32[np.ndarray, "L L"]

    def sizes(
        self, probabilities: Float[np.ndarray, "*B L E"], seen: int | Integer[np.ndarray, "*B"]
    ) -> Int64[np.ndarray, "*B L"]:
        """How many first-ranked experts of each layer are its set. seen: layers seen, of each forecast."""
        return sizes_of(self.least[seen], self.threshold[seen], probabilities)


def sizes_of(
    least: Int64[np.ndarray, "*N"],
    threshold: Float[np.ndarray, "*N"],
    probabilities: Float[np.ndarray, "*N E"],
) -> Int64[np.ndarray, "*N"]:
    """How many first-ranked experts are in a set of at least so many, and of all that are so probable."""
    probable = np.count_nonzero(probabilities >= threshold[..., None], axis=-1)
    sizes: Int64[np.ndarray, "*N"] = np.maximum(least, probable)
    return sizes


def all_sets(coverage: Coverage, num_layers: int) -> tuple[CoverageSets, ...]:
    """Those of every level, as the manifest has them."""
    no_thresholds = [None] * len(coverage.levels)
    return tuple(
        _sets(experts, thresholds, num_layers)
        for experts, thresholds in zip(coverage.experts, coverage.thresholds or no_thresholds, strict=True)
    )


def level_number(coverage: Coverage, level: float) -> int:
    """Which of the manifest's levels answers this one: itself, or the next higher one, which promises more.

    level: probability in (0, 1]. Raises CoverageUnknown.
    """
    if not coverage.levels:
        raise CoverageUnknown(
            "This version has no coverage tables.", remedy="Ask for a number of experts instead."
        )
    enough = [(known, index) for index, known in enumerate(coverage.levels) if known >= level > 0]
    if not enough:
        listed = ", ".join(map(str, sorted(coverage.levels)))
        raise CoverageUnknown(
            f"Coverage {level} was asked for, expected above 0 and at most {max(coverage.levels)}.",
            remedy=f"Choose one of {listed}, or ask for a number of experts.",
        )
    return min(enough)[1]


def _sets(
    experts: Sequence[Sequence[int]], thresholds: Sequence[Sequence[float]] | None, num_layers: int
) -> CoverageSets:
    least = np.zeros((num_layers, num_layers), np.int64)
    threshold = np.full((num_layers, num_layers), NOBODY, np.float32)
    for layer in range(num_layers):
        # Distance d of layer l is with l + 1 - d layers seen.
        least[layer::-1, layer] = experts[layer]
        if thresholds is not None:
            threshold[layer::-1, layer] = thresholds[layer]
    return CoverageSets(least, threshold)
