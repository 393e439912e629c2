"""Do coverage sets hold what they promise on a trace, as published and with adaptation on?

trace + version -> told -> adapted -> share covered and mean set size, by domain

    specmoe evaluate gpt-oss-20b --traces test.npz --adapt
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int16, Int64

from speculation.adaptive_coverage import STEP, AdaptiveCoverage
from speculation.runtime import Speculator
from traces.trace import RoutingTrace
from training.forecasts import of_speculator

ALL = "all"
# What is held of all forecasts at once; of longer traces, fewer tokens are looked at.
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Told:
    """All forecasts of M tokens, in the trace's order: [token, layers seen, target layer].

    scores: best first. needed: first-ranked experts it took to have all routed ones; 0 where the layer was
    seen. rows: which tokens of the trace.
    """

    scores: Float32[np.ndarray, "M L L E"]
    needed: Int16[np.ndarray, "M L L"]
    rows: Int64[np.ndarray, "M"]


def told(speculator: Speculator, trace: RoutingTrace, *, every: int = 1) -> Told:
    """What is forecast of every `every`-th token, or of fewer where that would take more than 1 GiB."""
    spec = trace.spec
    token_bytes = 4 * spec.num_layers * spec.num_layers * spec.num_experts
    every = max(every, -(-trace.num_tokens * token_bytes // MAX_BYTES))
    rows = np.arange(0, trace.num_tokens, every)
    shape = (len(rows), spec.num_layers, spec.num_layers)
    scores, needed = np.zeros((*shape, spec.num_experts), np.float32), np.zeros(shape, np.int16)
    for forecast in of_speculator(speculator, trace, every=every):
        at, seen = forecast.rows // every, forecast.seen
        routed = forecast.ranked.routed
        scores[at, seen, seen:] = forecast.ranked.scores
        needed[at, seen, seen:] = routed.shape[-1] - routed[..., ::-1].argmax(axis=-1)
    return Told(scores, needed, rows)


def adapted(
    found: Told, speculator: Speculator, step: float = STEP
) -> tuple[Bool[np.ndarray, "M A L L"], Int16[np.ndarray, "M A L L"]]:
    """(covered, sizes) of each token's sets, one stream through all tokens; step 0: as published.

    Each token's sets follow from the tokens before it.
    """
    running = AdaptiveCoverage(speculator, step=step)
    seen = np.arange(speculator.spec.num_layers)
    covered, sizes = [], []
    for scores, needed in zip(found.scores, found.needed, strict=True):
        now = running.sizes(scores, seen)
        held = needed <= now
        sizes.append(now.astype(np.int16))
        covered.append(held & (needed > 0))
        running.move(seen, ~held)
    return np.stack(covered), np.stack(sizes)


def adaptation_report(
    speculator: Speculator, trace: RoutingTrace, *, every: int = 1
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """[domain or "all"]["published" or "adapted"][level] -> covered, mean_set_size, over all forecasts.

    One stream of all sequences, in the trace's order. Raises CoverageUnknown where the version's sets have no
    thresholds.
    """
    found = told(speculator, trace, every=every)
    of_token = np.repeat(np.array(trace.domains), np.diff(trace.starts))[found.rows]
    levels = speculator.manifest.coverage.levels
    report: dict[str, dict[str, Any]] = {}
    for name, step in (("published", 0.0), ("adapted", STEP)):
        covered, sizes = adapted(found, speculator, step)
        for domain in [ALL, *np.unique(of_token).tolist()]:
            rows = np.full(len(found.rows), True) if domain == ALL else of_token == domain
            report.setdefault(domain, {})[name] = shares(covered[rows], sizes[rows], levels)
    return report


def shares(
    covered: Bool[np.ndarray, "M A L L"], sizes: Int16[np.ndarray, "M A L L"], levels: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    """By level: share of the forecasts whose set had all routed experts, and the mean size of a set."""
    forecasts = np.count_nonzero(sizes[:, 0])
    return {
        f"{level:g}": {
            "covered": float(np.count_nonzero(covered[:, row]) / forecasts),
            "mean_set_size": float(sizes[:, row].sum(dtype=np.int64) / forecasts),
        }
        for row, level in enumerate(levels)
    }
