"""The client for an asyncio decode loop: as `client.py`, which documents what both do, but awaited.

async with AsyncClient() as client:
    prediction = await client.predict("gpt-oss-20b", Sequence(experts=seen, token_id=976))
"""

from __future__ import annotations

import asyncio
import collections.abc
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from specmoe_client.client import DEFAULT_TIMEOUT_MS, DEFAULT_URL, PATIENT_TIMEOUT_MS
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


class AsyncClient:
    """`Client` for asyncio: the same arguments, answers and errors. Belongs to one event loop."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        uds: str | None = None,
        timeout_ms: float = DEFAULT_TIMEOUT_MS,
        retries: int = 1,
        headers: collections.abc.Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._address = Address(base_url, headers)
        self._transport = transport or httpx.AsyncHTTPTransport(
            verify=self._address.verify, uds=uds, limits=LIMITS
        )
        self._timeout_ms = Deadline(timeout_ms).timeout_ms
        self._retries = retries
        self._failures = Failures()

    @property
    def last_failure(self) -> NoPrediction | None:
        """Why the last question got no answer; None where it got one."""
        return self._failures.last

    async def predict(
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
            answer = read_prediction(await self._ask("POST", "/v1/predict", deadline, body), len(asked))
            deadline.check()
            return answer
        return None

    async def predict_union(
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
            answer = read_union(await self._ask("POST", "/v1/predict", deadline, body))
            deadline.check()
            return answer
        return None

    async def models(self, *, timeout_ms: float = PATIENT_TIMEOUT_MS) -> tuple[ModelInfo, ...]:
        """What the service serves. Raises NoPrediction or RequestRefused."""
        return read_models(await self._ask("GET", "/v1/models", Deadline(timeout_ms)))

    async def ready(self, *, timeout_ms: float = PATIENT_TIMEOUT_MS) -> bool:
        """Whether every model is ready; opens the connection. If not, the reason is in `last_failure`."""
        deadline = Deadline(timeout_ms)
        with self._failures.watch("none"):
            await self._ask("GET", "/readyz", deadline)
            return True
        return False

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _ask(self, method: str, path: str, deadline: Deadline, body: bytes | None = None) -> Any:
        attempts = Attempts(deadline, self._retries)
        while True:
            try:
                return await self._once(self._address.request(method, path, deadline, body), deadline)
            except NoPrediction as failure:
                await asyncio.sleep(attempts.pause_after(failure))

    async def _once(self, request: httpx.Request, deadline: Deadline) -> Any:
        with transport_errors(deadline):
            async with asyncio.timeout(deadline.left_s):
                response = await self._transport.handle_async_request(request)
                try:
                    reply = Reply(response, deadline)
                    async for piece in response.aiter_raw():
                        reply.add(piece)
                finally:
                    await response.aclose()
        return reply.document()
