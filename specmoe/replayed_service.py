"""The service that a replay asks: recorded tokens become questions of the client, answers become arrays.

specmoe replay test.npz --model gpt-oss-20b
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int32
from specmoe_client import Client, ModelInfo, RoutingShape, Sequence, SequencePrediction, Token

from specmoe.errors import ReplayError
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace


def check_fit(served: Iterable[ModelInfo], model: str, spec: RoutingSpec) -> None:
    """Raises ReplayError where the model is not among the served ones, not ready, or of another shape."""
    models = {info.model: info for info in served}
    if model not in models:
        raise ReplayError(
            f"The service does not serve {model!r}; it serves {', '.join(sorted(models)) or 'nothing'}.",
            remedy="Give one of these as --model.",
        )
    info = models[model]
    if not info.ready or info.shape is None:
        raise ReplayError(
            f"The service is not ready for {model}: {info.reason}.", remedy="Wait, or see its log."
        )
    if _shape(info.shape) != _shape(spec):
        raise ReplayError(
            f"{model} is served with {_shape(info.shape)}, the trace of {spec.model} has {_shape(spec)}.",
            remedy="Play a trace of the model that is served.",
        )


class ReplayedService:
    """Asks as a model server would; keeps the latency of each answer and the reason of each missing one.

    context_tokens: finished tokens of the sequence sent with each question. top_n: experts of a layer wanted,
    or coverage: as many as hold all the routed ones with this probability.
    """

    def __init__(
        self,
        client: Client,
        trace: RoutingTrace,
        *,
        model: str,
        version: int | str | None,
        context_tokens: int,
        top_n: int | None = None,
        coverage: float | None = None,
    ) -> None:
        self._client, self._trace, self._model, self._version = client, trace, model, version
        self._context_tokens = context_tokens
        self._top_n, self._coverage = top_n, coverage
        # A finished token is sent many times: its JSON is made once and kept while it is context.
        self._finished = functools.lru_cache(maxsize=context_tokens)(self._token)
        self._latencies_ms: list[float] = []
        self._versions: set[int] = set()
        self._unanswered: Counter[str] = Counter()

    def ask(self, token: int, start: int, seen: int) -> Int32[np.ndarray, "M n"] | None:
        """The service's ranking of the layers from `seen` on; None where no answer came in time."""
        so_far = self._token(token, seen)
        context = [
            self._finished(earlier) for earlier in range(max(start, token - self._context_tokens), token)
        ]
        question = Sequence(so_far.experts, so_far.gates, so_far.token_id, context)
        began_s = time.perf_counter()
        answer = self._client.predict(
            self._model, question, version=self._version, top_n=self._top_n, coverage=self._coverage
        )
        if answer is None:
            failure = self._client.last_failure
            self._unanswered[failure.reason if failure else "unknown"] += 1
            return None
        self._latencies_ms.append((time.perf_counter() - began_s) * 1000)
        self._versions.add(answer.version)
        return self._all_layers(answer.sequences[0], seen)

    def report(self) -> dict[str, Any]:
        """Versions that answered, and how fast."""
        return {
            "versions": sorted(self._versions),
            "context_tokens": self._context_tokens,
            "answered": len(self._latencies_ms),
            "unanswered": dict(self._unanswered),
            "latency_ms": percentiles(self._latencies_ms),
        }

    def _all_layers(self, prediction: SequencePrediction, seen: int) -> Int32[np.ndarray, "M n"]:
        layers = list(range(seen, self._trace.spec.num_layers))
        if prediction.layers.tolist() != layers:
            raise ReplayError(
                f"The service predicted layers {prediction.layers.tolist()}, expected {layers}.",
                remedy="Check that the service and this command are of the same release.",
            )
        return prediction.experts

    def _token(self, token: int, seen: int | None = None) -> Token:
        trace = self._trace
        return Token(
            experts=trace.experts[token, :seen],
            gates=None if trace.gates is None else trace.gates[token, :seen],
            token_id=None if trace.token_ids is None else int(trace.token_ids[token]),
        )


def percentiles(values: list[float]) -> dict[str, float]:
    """Measured values, none in between; nothing of nothing."""
    names = {"p50": 50, "p90": 90, "p99": 99, "max": 100} if values else {}
    return {name: float(np.percentile(values, share, method="higher")) for name, share in names.items()}


def _shape(shape: RoutingShape | RoutingSpec) -> str:
    return f"{shape.num_layers} layers x {shape.num_experts} experts, top-{shape.top_k}"
