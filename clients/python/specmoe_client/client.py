"""The client for a decode loop that is not asynchronous.

python -c "from specmoe_client import Client; print(Client().models())"
"""

from __future__ import annotations

import collections.abc
import time
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from specmoe_client.deadline import Attempts, Deadline
from specmoe_client.errors import NoPrediction
from specmoe_client.exchange import LIMITS, Address, Reply, transport_errors
from specmoe_client.failures import Failures, OnFailure
from specmoe_client.predictions import (
    ModelInfo,
    Prediction,
    UnionPrediction,
    read_models,
    read_prediction,
    read_union,
)
from specmoe_client.questions import Options, Sequence, as_list, predict_body

DEFAULT_URL = "http://127.0.0.1:8080"
# Longer than a prediction takes (about one millisecond), shorter than a decoder would notice.
DEFAULT_TIMEOUT_MS = 5.0
# Questions outside the decode loop.
PATIENT_TIMEOUT_MS = 5000.0


class Client:
    """Asks a specMoE service which experts the coming layers will need. Connections are kept and reused.

    base_url: where the service listens. uds: path of its Unix socket, instead of TCP.
    timeout_ms: total time for a prediction, connecting and retries included; what is later is no prediction.
    retries: further attempts while time is left, where no connection could be made or the service said 503.
    headers: sent with every request. transport: another httpx transport, for example for own certificates.

    May be shared by threads. Raises ClientError where base_url is no URL.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        uds: str | None = None,
        timeout_ms: float = DEFAULT_TIMEOUT_MS,
        retries: int = 1,
        headers: collections.abc.Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._address = Address(base_url, headers)
        self._transport = transport or httpx.HTTPTransport(
            verify=self._address.verify, uds=uds, limits=LIMITS
        )
        self._timeout_ms = Deadline(timeout_ms).timeout_ms
        self._retries = retries
        self._failures = Failures()

    @property
    def last_failure(self) -> NoPrediction | None:
        """Why the last question got no answer; None where it got one."""
        return self._failures.last

    def predict(
        self,
        model: str,
        sequences: Sequence | collections.abc.Sequence[Sequence],
        *,
        timeout_ms: float | None = None,
        on_failure: OnFailure = "none",
        **options: Unpack[Options],
    ) -> Prediction | None:
        """The experts that each sequence's coming layers will probably need. `options`: see Options.

        None, with the reason in `last_failure`, where no answer came in time; with on_failure="raise" that is
        a NoPrediction. Raises RequestRefused where the question itself is wrong.
        """
        deadline = Deadline(self._timeout_ms if timeout_ms is None else timeout_ms)
        with self._failures.watch(on_failure):
            asked = as_list(sequences)
            body = predict_body(model, asked, options, "per_sequence")
            answer = read_prediction(self._ask("POST", "/v1/predict", deadline, body), len(asked))
            deadline.check()
            return answer
        return None

    def predict_union(
        self,
        model: str,
        sequences: collections.abc.Sequence[Sequence],
        *,
        timeout_ms: float | None = None,
        on_failure: OnFailure = "none",
        **options: Unpack[Options],
    ) -> UnionPrediction | None:
        """The experts that at least one of the sequences will probably need. Fails as `predict` does."""
        deadline = Deadline(self._timeout_ms if timeout_ms is None else timeout_ms)
        with self._failures.watch(on_failure):
            body = predict_body(model, as_list(sequences), options, "union")
            answer = read_union(self._ask("POST", "/v1/predict", deadline, body))
            deadline.check()
            return answer
        return None

    def models(self, *, timeout_ms: float = PATIENT_TIMEOUT_MS) -> tuple[ModelInfo, ...]:
        """What the service serves. Raises NoPrediction or RequestRefused."""
        return read_models(self._ask("GET", "/v1/models", Deadline(timeout_ms)))

    def ready(self, *, timeout_ms: float = PATIENT_TIMEOUT_MS) -> bool:
        """Whether every model is ready; opens the connection. If not, the reason is in `last_failure`."""
        deadline = Deadline(timeout_ms)
        with self._failures.watch("none"):
            self._ask("GET", "/readyz", deadline)
            return True
        return False

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, path: str, deadline: Deadline, body: bytes | None = None) -> Any:
        attempts = Attempts(deadline, self._retries)
        while True:
            try:
                return self._once(self._address.request(method, path, deadline, body), deadline)
            except NoPrediction as failure:
                time.sleep(attempts.pause_after(failure))

    def _once(self, request: httpx.Request, deadline: Deadline) -> Any:
        with transport_errors(deadline):
            response = self._transport.handle_request(request)
            try:
                reply = Reply(response, deadline)
                for piece in response.iter_raw():
                    reply.add(piece)
            finally:
                response.close()
        return reply.document()
