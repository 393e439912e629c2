"""The streams' own scores for Prometheus: read from the hubs when it scrapes, and costing nothing before.

Hub.scores -> `LiveCollector` -> /metrics

curl -s localhost:8080/metrics | grep specmoe_live
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from service.stream.hub import Hub

Family = CounterMetricFamily | GaugeMetricFamily
LABELS = ("model", "version", "distance")


class LiveCollector(Collector):
    """hubs: those there are at the time of a scrape."""

    def __init__(self, hubs: Callable[[], Iterable[Hub]]) -> None:
        self._hubs = hubs

    def describe(self) -> Iterator[Family]:
        """The names alone, which need no hub."""
        yield from _families()

    def collect(self) -> Iterator[Family]:
        """Every distance of every version that streams use."""
        layers, found, first, covered, error = _families()
        for hub in self._hubs():
            version = (hub.running.model, str(hub.running.version))
            for distance, scores in hub.scores.report().items():
                at = (*version, distance)
                layers.add_metric(at, scores["layers"])
                routed = scores["layers"] * hub.running.speculator.spec.top_k
                for within, recall in (("k", scores["recall_at_k"]), ("2k", scores["recall_at_2k"])):
                    found.add_metric((*at, within), round(recall * routed))
                first.add_metric(at, round(scores["hit_at_1"] * scores["layers"]))
                for level, share in scores["coverage"].items():
                    covered.add_metric((*at, level), round(share * scores["layers"]))
                error.add_metric(at, scores["ece"])
        yield from (layers, found, first, covered, error)


def _families() -> tuple[Family, ...]:
    counter = CounterMetricFamily
    return (
        counter(
            "specmoe_live_layers", "Forecast layers whose routing came, of scored tokens.", labels=LABELS
        ),
        counter(
            "specmoe_live_found",
            "Routed experts among the first k, or 2k, forecast; of layers * top_k.",
            labels=(*LABELS, "within"),
        ),
        counter("specmoe_live_first_hits", "Layers whose first-ranked expert was routed.", labels=LABELS),
        counter(
            "specmoe_live_covered",
            "Layers whose routed experts were all in the set made for this level.",
            labels=(*LABELS, "level"),
        ),
        GaugeMetricFamily(
            "specmoe_live_calibration_error", "Expected calibration error so far.", labels=LABELS
        ),
    )
