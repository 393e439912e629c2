"""From probabilities to what is answered: ranked lists a layer, cut at top_n or at a coverage.

probabilities -> `per_sequence` or `union` -> JSON

.venv/bin/python -m pytest tests/service/test_predict.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from service.batch import Batch
from service.errors import RequestInvalid
from service.loading import Running
from service.schemas import PredictRequest
from speculation.demand import union_demand
from speculation.ranking import expected_recall, rank
from traces.spec import RoutingSpec

# What is meant where a request says neither top_n nor coverage: twice as many as are routed.
DEFAULT_TOP_K_MULTIPLE = 2
# Calibration is good to about a percent; more decimals are bytes on the wire.
DECIMALS = 6
# An outlook has all experts of all layers.
OUTLOOK_DECIMALS = 4

Wanted = Bool[np.ndarray, "B L"]
Sizes = Int64[np.ndarray, "B L"]
Probabilities = Float32[np.ndarray, "B L E"]


def check_amount(request: PredictRequest, running: Running) -> None:
    """Raises RequestInvalid where top_n exceeds the experts or comes with coverage, CoverageUnknown for a
    level above the version's."""
    if request.top_n is not None and request.coverage is not None:
        raise RequestInvalid(
            "top_n and coverage came together, expected one of them.",
            remedy="top_n asks for a number of experts a layer, coverage for as many as it takes.",
        )
    if request.coverage is not None:
        running.speculator.coverage_sets(request.coverage)
    spec = running.speculator.spec
    if request.top_n is not None and request.top_n > spec.num_experts:
        raise RequestInvalid(
            f"top_n is {request.top_n}, but {spec.model} has {spec.num_experts} experts a layer.",
            remedy=f"Ask for 1 to {spec.num_experts}.",
        )


def list_sizes(
    request: PredictRequest,
    running: Running,
    wanted: Wanted,
    seen: Int64[np.ndarray, "B"],
    probabilities: Probabilities,
) -> Sizes:
    """How many experts each sequence's layer gets, as checked by `check_amount`; 0 where it is not wanted."""
    if request.coverage is not None:
        sets = running.speculator.coverage_sets(request.coverage)
        return np.where(wanted, sets.sizes(probabilities, seen), 0)
    spec = running.speculator.spec
    top_n = request.top_n or min(spec.num_experts, DEFAULT_TOP_K_MULTIPLE * spec.top_k)
    return np.where(wanted, top_n, 0)


def per_sequence(
    probabilities: Probabilities, sizes: Sizes, batch: Batch, spec: RoutingSpec
) -> list[list[dict[str, Any]]]:
    """For each sequence, its wanted layers in order, as `service.schemas.LayerPrediction`."""
    # Layers that every sequence has passed are not ranked: of a half-finished token that is half the work.
    passed = int(batch.seen.min())
    probabilities, sizes = probabilities[:, passed:], sizes[:, passed:]
    longest = max(1, int(sizes.max()))
    experts, ranked = rank(probabilities, longest)
    expert_lists, probability_lists = experts.tolist(), _plain(_with_recall(ranked, sizes, spec))
    return [
        [
            {
                "layer": layer,
                "distance": layer - seen + 1,
                "experts": expert_lists[number][row][:size],
                "probabilities": probability_lists[number][row][:size],
                "expected_recall": probability_lists[number][row][longest],
            }
            for row, (layer, size) in enumerate(enumerate(asked, passed))
            if size
        ]
        for number, (asked, seen) in enumerate(zip(sizes.tolist(), batch.seen.tolist(), strict=True))
    ]


def union(
    probabilities: Probabilities, sizes: Sizes, request: PredictRequest, spec: RoutingSpec
) -> list[dict[str, Any]]:
    """The wanted layers in order, as `service.schemas.UnionPrediction`.

    A sequence that has passed a layer, or is not asked about it, needs none of its experts.
    """
    demand = union_demand(np.where(sizes[..., None] > 0, probabilities, np.float32(0)))
    experts, ranked = rank(demand, spec.num_experts)
    if request.coverage is None:
        kept = np.arange(spec.num_experts) < sizes.max(axis=0)[:, None]
    else:
        kept = np.take_along_axis(_in_some_set(probabilities, sizes), experts, axis=-1)
    rounded = np.round(ranked.astype(np.float64), DECIMALS)
    return [
        {
            "layer": int(layer),
            "experts": experts[layer, kept[layer]].tolist(),
            "probabilities": rounded[layer, kept[layer]].tolist(),
        }
        for layer in np.flatnonzero(sizes.any(axis=0))
    ]


def outlook(uses: Probabilities, request: PredictRequest, running: Running) -> dict[str, Any]:
    """As `service.schemas.Outlook`; for the union one table, of a use by any sequence."""
    described = running.speculator.manifest.outlook
    tables = union_demand(uses)[None] if request.combine == "union" else uses
    rounded = np.round(tables.astype(np.float64), OUTLOOK_DECIMALS)
    return {"tokens": described.tokens if described else 0, "uses": rounded.tolist()}


def _with_recall(
    ranked: Float32[np.ndarray, "B L n"], sizes: Sizes, spec: RoutingSpec
) -> Float32[np.ndarray, "B L n+1"]:
    """The ranked probabilities, and behind them the expected recall of as many as are listed."""
    longest = ranked.shape[-1]
    listed = ranked
    if sizes.min() < longest:  # what is not listed counts for nothing
        listed = np.where(np.arange(longest) < sizes[..., None], ranked, np.float32(0))
    together = np.empty((*ranked.shape[:-1], longest + 1), np.float32)
    together[..., :longest] = ranked
    together[..., longest] = expected_recall(listed, spec.top_k)
    return together


def _in_some_set(probabilities: Probabilities, sizes: Sizes) -> Bool[np.ndarray, "L E"]:
    """Which experts are among the first `sizes` of some sequence."""
    experts, _ = rank(probabilities, probabilities.shape[-1])
    first = np.arange(probabilities.shape[-1]) < sizes[..., None]
    members = np.zeros(probabilities.shape, bool)
    np.put_along_axis(members, experts.astype(np.int64), first, axis=-1)
    return np.asarray(members.any(axis=0))


def _plain(values: Float[np.ndarray, "..."]) -> Any:
    """Python numbers, rounded: float32 as it is would be written with 17 digits."""
    return np.round(values.astype(np.float64), DECIMALS).tolist()
