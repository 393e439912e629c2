"""What Prometheus reads at /metrics. One registry an app, so that two apps in a process do not mix.

curl -s localhost:8080/metrics | grep specmoe_request_seconds
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

# A step takes some 150 µs and a late answer is worthless after a few ms; prometheus-client begins at 5 ms.
SECONDS_BUCKETS = (
    50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 300e-6, 400e-6, 600e-6, 800e-6,
    1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 10e-3, 25e-3, 100e-3, 500e-3, 2.0, 10.0,
)  # fmt: skip


class VersionMetrics:
    """The labelled children of one version, looked up once: `labels()` costs more than `observe()`."""

    def __init__(self, metrics: Metrics, model: str, version: int) -> None:
        self.request_seconds = metrics.request_seconds.labels(model, version)
        self.model_seconds = metrics.model_seconds.labels(model, version)
        self.stream_seconds = metrics.stream_seconds.labels(model, version)
        self.forecasts = metrics.forecasts.labels(model, version)
        self.dropped_forecasts = metrics.dropped_forecasts.labels(model, version)


class Metrics:
    """Everything that is counted. Labels take only what the service knows: never a word from a request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        version = ("model", "version")
        self.request_seconds = Histogram(
            "specmoe_request_seconds",
            "From a prediction's headers to the last byte of its answer, where a version answered.",
            version,
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.model_seconds = Histogram(
            "specmoe_model_seconds",
            "Time in the model at once: a request with its context, requests that came together, or a "
            "tick of the streams.",
            version,
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.stream_seconds = Histogram(
            "specmoe_stream_seconds",
            "From a stream's message to the forecast it made due.",
            version,
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.forecasts = Counter(
            "specmoe_stream_forecasts", "Forecasts sent, by sequence.", version, registry=self.registry
        )
        self.dropped_forecasts = Counter(
            "specmoe_stream_dropped_forecasts",
            "Forecasts that were due and not sent: overtaken, too late, or not read.",
            version,
            registry=self.registry,
        )
        self.messages = Counter(
            "specmoe_stream_messages",
            "Messages of clients by outcome: ok, or the code of the error.",
            ("outcome",),
            registry=self.registry,
        )
        self.streams = Gauge("specmoe_streams", "Open streams.", registry=self.registry)
        self.stream_sequences = Gauge(
            "specmoe_stream_sequences", "Open sequences of all streams.", registry=self.registry
        )
        self.requests = Counter(
            "specmoe_requests",
            "Requests by endpoint and outcome: ok, or the code of the error body. Model and version are "
            "empty where none answered.",
            ("endpoint", "outcome", *version),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "specmoe_predictions_in_flight", "Predictions being worked on.", registry=self.registry
        )
        self.loaded_version = Gauge(
            "specmoe_loaded_version",
            "1 for every version in memory; served: whether it answers where a request names none.",
            (*version, "provider", "served"),
            registry=self.registry,
        )
        self.model_ready = Gauge(
            "specmoe_model_ready",
            "1 where a configured model is loaded, warmed up and checked.",
            ("model",),
            registry=self.registry,
        )
        self.refused_loads = Counter(
            "specmoe_refused_loads", "Versions found unfit to serve.", ("model",), registry=self.registry
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._versions: dict[tuple[str, int], VersionMetrics] = {}
        self._messages: dict[str, Counter] = {}
        self._outcomes: dict[tuple[str, str, str, str], Counter] = {}

    def of_version(self, model: str, version: int) -> VersionMetrics:
        """The cached children of a version."""
        return self._versions.setdefault((model, version), VersionMetrics(self, model, version))

    def count(self, endpoint: str, outcome: str, model: str, version: str) -> None:
        """One request more."""
        key = (endpoint, outcome, model, version)
        child = self._outcomes.get(key)
        if child is None:
            child = self._outcomes[key] = self.requests.labels(*key)
        child.inc()

    def count_message(self, outcome: str) -> None:
        """One message of a stream more."""
        child = self._messages.get(outcome)
        if child is None:
            child = self._messages[outcome] = self.messages.labels(outcome)
        child.inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
