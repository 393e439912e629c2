"""Do coverage sets hold what they promise on a trace, as published and with adaptation on?

trace + version -> needs -> adapted -> share covered and mean set size, by domain

    specmoe evaluate gpt-oss-20b --traces test.npz --adapt
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int16

from model_store.manifest import Coverage
from speculation.adaptive_coverage import STEP, AdaptiveCoverage
from speculation.runtime import Speculator
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.forecasts import of_speculator

ALL = "all"


def needs(speculator: Speculator, trace: RoutingTrace, *, every: int = 1) -> Int16[np.ndarray, "M L L"]:
    """[token, layers seen, target layer]: first-ranked experts it took to have all routed ones; 0 where seen.

    Of every `every`-th token, in the trace's order.
    """
    layers = trace.spec.num_layers
    found = np.zeros((-(-trace.num_tokens // every), layers, layers), np.int16)
    for forecast in of_speculator(speculator, trace, every=every):
        routed = forecast.ranked.routed
        needed = routed.shape[-1] - routed[..., ::-1].argmax(axis=-1)
        found[forecast.rows // every, forecast.seen, forecast.seen :] = needed
    return found


def adapted(
    needed: Int[np.ndarray, "M L L"], coverage: Coverage, spec: RoutingSpec, step: float = STEP
) -> tuple[Bool[np.ndarray, "M A L L"], Int16[np.ndarray, "M A L L"]]:
    """(covered, sizes) of each token's sets, one stream through all tokens; step 0: the tables as they are.

    Each token's sets follow from the tokens before it.
    """
    running = AdaptiveCoverage(coverage, spec, step=step)
    covered, sizes = [], []
    for token in needed:
        now = running.sizes
        sizes.append(now.astype(np.int16))
        covered.append((token <= now) & (token > 0))
        running.observe(token)
    return np.stack(covered), np.stack(sizes)


def adaptation_report(
    speculator: Speculator, trace: RoutingTrace, *, every: int = 1
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """[domain or "all"]["published" or "adapted"][level] -> covered, mean_set_size, over all forecasts.

    One stream of all sequences, in the trace's order.
    """
    found = needs(speculator, trace, every=every)
    of_token = np.repeat(np.array(trace.domains), np.diff(trace.starts))[::every]
    coverage, spec = speculator.manifest.coverage, speculator.spec
    report: dict[str, dict[str, Any]] = {}
    for name, step in (("published", 0.0), ("adapted", STEP)):
        covered, sizes = adapted(found, coverage, spec, step)
        for domain in [ALL, *np.unique(of_token).tolist()]:
            rows = np.full(len(found), True) if domain == ALL else of_token == domain
            report.setdefault(domain, {})[name] = shares(covered[rows], sizes[rows], coverage.levels)
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
