"""Scores a version as it would be served: its ONNX graphs, run by `speculation`, on traces it never saw.

trace + version -> forecasts -> metrics by distance, layer and domain -> `training.report`

    specmoe evaluate gpt-oss-20b --traces test.npz --report report
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from speculation.adaptive_coverage import AdaptiveCoverage
from speculation.runtime import Speculator
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.adaptation import adaptation_report
from training.baselines import Baseline
from training.cost import measure_cost
from training.errors import EvaluationError, check_same_shape
from training.forecasts import Forecast, of_baseline, of_speculator
from training.keeping import cache_report
from training.metrics import START, Metrics, distance_name

# What a predictor does without its optional inputs is scored on one token in so many: it is a side view.
WITHHELD_EVERY = 4


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a version did on a trace.

    every: one token in so many was scored.
    metrics: of the version.
    domains: recall by the prompts' domain.
    withheld: metrics without an optional input, by the input's name, on fewer tokens.
    baselines: metrics by baseline.
    cost: see `training.cost`.
    cache: hit rates (`training.keeping`); empty where they were not asked for.
    adaptation: coverage with adaptation on, beside that without (`training.adaptation`); empty likewise.
    """

    spec: RoutingSpec
    version: int
    trace: RoutingTrace
    every: int
    metrics: Metrics
    domains: dict[str, dict[str, dict[str, float]]]
    withheld: dict[str, Metrics]
    baselines: dict[str, Metrics]
    cost: dict[str, Any]
    cache: dict[str, dict[str, float]]
    adaptation: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Everything as plain JSON values; docs/evaluation.md tells what each means."""
        spec, trace = self.spec, self.trace
        return {
            "model": spec.model,
            "version": self.version,
            "tokens": trace.num_tokens,
            "sequences": trace.num_sequences,
            "scored_every": self.every,
            "spec": {"num_layers": spec.num_layers, "num_experts": spec.num_experts, "top_k": spec.top_k},
            "trace": {
                "model": trace.spec.model,
                "token_ids": trace.token_ids is not None,
                "gates": trace.gates is not None,
                "hidden": trace.hidden is not None,
            },
            "distances": self.metrics.distances(),
            "layers": self.metrics.layers(),
            "by_layer": self.metrics.by_layer_and_distance(),
            "reliability": self.metrics.reliability(),
            "domains": self.domains,
            **{f"without_{name}": metrics.distances() for name, metrics in self.withheld.items()},
            "baselines": {name: metrics.distances() for name, metrics in self.baselines.items()},
            "cost": self.cost,
            "cache": self.cache,
            "adaptation": self.adaptation,
        }


def evaluate(
    speculator: Speculator,
    trace: RoutingTrace,
    *,
    baselines: Sequence[Baseline] = (),
    every: int = 1,
    cache: bool = False,
    adapt: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Run every sequence through the version and score every forecast of every token.

    baselines: fitted ones, scored on the same tokens.
    every: score one token in so many; the others are lived through all the same.
    cache: also simulate what a cache of expert weights would keep.
    adapt: also score coverage sets that learn from their misses.
    progress: draw bars on standard error.

    Raises SpecMismatch where the trace is of another shape than the version, EvaluationError where it has no
    token, ForecastInvalid for a probability that is not finite, CoverageUnknown where sets without thresholds
    are to learn.
    """
    manifest = speculator.manifest
    check_same_shape(trace.spec, speculator.spec, f"{speculator.spec.model} version {manifest.version}")
    if not trace.num_tokens:
        raise EvaluationError("The trace has no token.", remedy="Give a trace with one sequence at least.")
    if adapt:
        AdaptiveCoverage(speculator)  # refuses what it cannot move, before anything takes long
    metrics, domains = Metrics(speculator.spec, coverage=manifest.coverage), DomainRecall(trace)
    forecasts = of_speculator(speculator, trace, every=every)
    for forecast in _shown(forecasts, trace, every, "the version", progress):
        metrics.add(forecast.seen, forecast.ranked)
        domains.add(forecast)
    return Evaluation(
        spec=speculator.spec,
        version=manifest.version,
        trace=trace,
        every=every,
        metrics=metrics,
        domains=domains.recall(),
        withheld=_withheld(speculator, trace, every * WITHHELD_EVERY, progress),
        baselines={b.name: score_baseline(b, trace, every=every, progress=progress) for b in baselines},
        cost=measure_cost(speculator),
        cache=cache_report(speculator, trace) if cache else {},
        adaptation=adaptation_report(speculator, trace, every=every) if adapt else {},
    )


def score_version(
    speculator: Speculator,
    trace: RoutingTrace,
    *,
    every: int = 1,
    progress: bool = False,
    title: str = "the version",
    **given: bool,
) -> Metrics:
    """Metrics of a version on one token in `every`. given: `token_ids`, `gates`, `hidden`: whether it gets
    them."""
    metrics = Metrics(speculator.spec, coverage=speculator.manifest.coverage)
    forecasts = of_speculator(speculator, trace, every=every, **given)
    for forecast in _shown(forecasts, trace, every, title, progress):
        metrics.add(forecast.seen, forecast.ranked)
    return metrics


def score_baseline(
    baseline: Baseline, trace: RoutingTrace, *, every: int = 1, progress: bool = False
) -> Metrics:
    """Metrics of a fitted baseline on one token in `every`. Raises SpecMismatch, BaselineNotFitted."""
    metrics = Metrics(trace.spec, probabilities=baseline.gives_probabilities)
    for forecast in _shown(of_baseline(baseline, trace, every=every), trace, every, baseline.name, progress):
        metrics.add(forecast.seen, forecast.ranked)
    return metrics


@dataclass(slots=True)
class DomainRecall:
    """Recall by domain, at token start and one layer ahead."""

    trace: RoutingTrace
    _names: list[str] = field(init=False)
    _of_token: Int[np.ndarray, "N"] = field(init=False)
    _sums: dict[str, np.ndarray] = field(init=False)  # distance -> [domains, (slots, hits@k, hits@2k)]

    def __post_init__(self) -> None:
        names, of_sequence = np.unique(self.trace.domains, return_inverse=True)
        self._names = names.tolist()
        self._of_token = np.repeat(of_sequence, np.diff(self.trace.starts))
        self._sums = {d: np.zeros((len(self._names), 3), np.int64) for d in (START, "1")}

    def add(self, forecast: Forecast) -> None:
        top_k = self.trace.spec.top_k
        layers = slice(None) if forecast.seen == 0 else slice(1)
        hits = np.stack([forecast.ranked.hits(n)[:, layers] for n in (top_k, 2 * top_k)], axis=-1)
        slots = np.full(len(hits), hits.shape[1] * top_k)
        counted = np.column_stack([slots, hits.sum(axis=1)])
        distance = distance_name(forecast.seen, forecast.seen)
        np.add.at(self._sums[distance], self._of_token[forecast.rows], counted)

    def recall(self) -> dict[str, dict[str, dict[str, float]]]:
        """domain -> distance -> recall_at_k, recall_at_2k; what was not scored is left out."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        for distance, sums in self._sums.items():
            for name, (slots, k, two_k) in zip(self._names, sums.tolist(), strict=True):
                if slots:
                    recall = {"recall_at_k": k / slots, "recall_at_2k": two_k / slots}
                    table.setdefault(name, {})[distance] = recall
        return table


def _withheld(speculator: Speculator, trace: RoutingTrace, every: int, progress: bool) -> dict[str, Metrics]:
    """What is left without an optional input that the version uses and the trace has."""
    manifest, scored = speculator.manifest, {}
    for name, matters in (
        ("token_ids", manifest.uses_token_ids and trace.token_ids is not None),
        ("gates", manifest.uses_gates and trace.gates is not None),
        ("hidden", manifest.hidden_size and trace.hidden is not None),
    ):
        if matters:
            scored[name] = score_version(
                speculator, trace, every=every, progress=progress, title=f"without {name}", **{name: False}
            )
    return scored


def _shown(
    forecasts: Iterable[Forecast], trace: RoutingTrace, every: int, title: str, progress: bool
) -> Iterator[Forecast]:
    """The same forecasts, counted by a bar."""
    total = -(-trace.num_tokens // every) * trace.spec.num_layers
    with tqdm(total=total, desc=title, unit="forecast", unit_scale=True, disable=not progress) as bar:
        for forecast in forecasts:
            yield forecast
            bar.update(len(forecast.rows))
