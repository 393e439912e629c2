"""The stream that a replay tells: recorded tokens are told layer by layer, and forecasts are waited for.

The service remembers the whole sequence, so that nothing is sent twice: see `replayed_service` for REST.

specmoe replay test.npz --model gpt-oss-20b
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Integer
from specmoe_client import Stream

from specmoe.replayed_service import percentiles
from traces.trace import RoutingTrace


class ReplayedStream:
    """Tells as a model server would; keeps the latency of each forecast and the reason of each missing one.

    stream: of the trace's model, forecasting at token start and after every layer that is asked about.
    """

    def __init__(self, stream: Stream, trace: RoutingTrace, *, timeout_ms: float) -> None:
        self._stream, self._trace, self._timeout_ms = stream, trace, timeout_ms
        self._sequence = stream.open()
        self._token, self._told = -1, 0
        self._latencies_ms: list[float] = []
        self._unanswered: Counter[str] = Counter()

    def ask(self, token: int, start: int, seen: int) -> Integer[np.ndarray, "M n"] | None:
        """The service's ranking of the layers from `seen` on; None where no forecast came in time."""
        if seen == 0:
            self._turn_to(token, start)
        began_s = time.perf_counter()
        if seen == 0:
            ids = None if self._trace.token_ids is None else [int(self._trace.token_ids[token])]
            self._stream.start([self._sequence], ids)
        else:
            self._tell(seen)
        forecast = self._stream.wait(self._sequence, self._timeout_ms)
        if forecast is None:
            failure = self._stream.last_failure
            self._unanswered[getattr(failure, "reason", "unknown")] += 1
            return None
        self._latencies_ms.append((time.perf_counter() - began_s) * 1000)
        # What stands behind a coverage set is filling.
        listed = np.arange(forecast.experts.shape[1]) < forecast.sizes[:, None]
        return np.where(listed, forecast.experts.astype(np.int32), -1)

    def report(self) -> dict[str, Any]:
        """The version that answered, and how fast."""
        version = self._stream.status.version
        return {
            "versions": [] if version is None else [version],
            "context_tokens": None,
            "answered": len(self._latencies_ms),
            "unanswered": dict(self._unanswered),
            "latency_ms": percentiles(self._latencies_ms),
        }

    def _turn_to(self, token: int, start: int) -> None:
        """The token before it is told to its end; a token that begins a sequence needs a new one."""
        if self._token >= 0:
            self._tell(self._trace.spec.num_layers)
        if token == start and self._token >= 0:
            self._stream.close_sequences([self._sequence])
            self._sequence = self._stream.open()
        self._token, self._told = token, 0

    def _tell(self, end: int) -> None:
        layers = slice(self._told, end)
        gates = None if self._trace.gates is None else self._trace.gates[self._token, layers][None]
        self._stream.route([self._sequence], self._trace.experts[self._token, layers][None], gates)
        self._told = end
