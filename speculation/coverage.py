"""How many experts to fetch so that with a given probability all the routed ones are among them.

The numbers were counted on validation routing and are in the manifest; here they are only looked up. The
probability holds over the layers at a distance, not for each of them (`training.survey`).

    n = coverage_size(manifest.coverage, level=0.95, layer=7, seen=5)
"""

from __future__ import annotations

from model_store.manifest import Coverage
from speculation.errors import CoverageUnknown


def coverage_size(coverage: Coverage, level: float, layer: int, seen: int) -> int:
    """Experts of `layer` to fetch when layers 0 .. seen - 1 of the token are known.

    level: probability in (0, 1]; one that was not counted is answered by the next higher one that was, which
    promises more. Raises CoverageUnknown.
    """
    table = coverage.experts[_table(coverage, level)]
    distance = _distance(len(table), layer, seen)
    return table[layer][distance - 1]


def _table(coverage: Coverage, level: float) -> int:
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


def _distance(layers: int, layer: int, seen: int) -> int:
    if not 0 <= layer < layers:
        raise CoverageUnknown(
            f"Layer {layer} was asked for, expected 0 to {layers - 1}.",
            remedy="Count MoE layers only, from 0.",
        )
    if not 0 <= seen <= layer:
        raise CoverageUnknown(
            f"Layer {layer} was asked for with {seen} layers seen, expected 0 to {layer}.",
            remedy="Ask for layers that were not seen yet.",
        )
    return layer - seen + 1
