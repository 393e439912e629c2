"""Around every request, in pure ASGI: its id, its time, its outcome, its limits.

server -> RequestScope (id, count, log, error body) -> InFlightLimit -> BodyLimit -> routes

Starlette's BaseHTTPMiddleware would cost more than the model.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, Overloaded, RequestInvalid
from service.loading import Running
from service.metrics import Metrics
from service.problems import INTERNAL, problem

log = logging.getLogger(__name__)

SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
OK = "ok"
DISCONNECTED = "client_disconnected"
# Below it, errors have one field more: where clients of the Open Inference Protocol look.
INFERENCE_PREFIX = "/v2"


@dataclass(slots=True)
class Exchange:
    """What is noted of one request while it is worked on.

    headers: by lower-case name, of several the last. endpoint: the path as the routes have it.
    """

    request_id: str
    headers: dict[bytes, bytes]
    endpoint: str = ""
    outcome: str = OK
    status: int = 0
    running: Running | None = None


def exchange_of(scope: Scope) -> Exchange:
    """The notes that RequestScope took along."""
    exchange: Exchange = scope["specmoe.exchange"]
    return exchange


class RequestScope:
    """Outermost: gives every request an id and every error a body; counts, times and logs."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log_share: float) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log_share = access_log_share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        exchange = scope["specmoe.exchange"] = Exchange(_request_id(headers), headers)
        tagged = _tagging(exchange, send)
        try:
            await self._app(scope, receive, tagged)
        except ClientDisconnect:
            exchange.outcome = DISCONNECTED
        except Exception as error:
            await _answer(error, scope, receive, tagged)
        finally:
            self._note(exchange, scope, time.perf_counter() - began)

    def _note(self, exchange: Exchange, scope: Scope, seconds: float) -> None:
        running = exchange.running
        model, version = (running.model, str(running.version)) if running else ("", "")
        route = scope.get("route")
        endpoint = exchange.endpoint or (route.path if route else "")
        self._metrics.count(endpoint, exchange.outcome, model, version)
        if running and exchange.outcome == OK:
            running.metrics.request_seconds.observe(seconds)
        if self._access_log_share and random.random() < self._access_log_share:  # noqa: S311  # a sample, no secret
            log.info(
                "request",
                extra={
                    "request_id": exchange.request_id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": exchange.status,
                    "outcome": exchange.outcome,
                    "milliseconds": round(seconds * 1e3, 3),
                    "model": model,
                    "version": version,
                },
            )


class BodyLimit:
    """Refuses a body that is too large: by what its header says, else while it arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            declared = exchange_of(scope).headers.get(b"content-length")
            if declared is not None:
                self._check(_bytes_declared(declared))
            receive = self._counting(receive)
        await self._app(scope, receive, send)

    def _counting(self, receive: Receive) -> Receive:
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            self._check(arrived)
            return message

        return counted

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLarge(
                f"The body has {size} bytes or more, at most {self._max_bytes} are allowed.",
                remedy="Split the batch, send less context, or raise SPECMOE_MAX_BODY_BYTES.",
            )


class InFlight:
    """Predictions at the same time, whichever way they came."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._gauge, self._count = limit, metrics.in_flight, 0

    def __enter__(self) -> None:
        if self._count >= self._limit:
            raise Overloaded(
                f"{self._count} predictions are in flight, at most {self._limit} are allowed.",
                remedy="Try again later, decode without a prediction, or raise SPECMOE_MAX_IN_FLIGHT.",
            )
        self._count += 1
        self._gauge.inc()

    def __exit__(self, *error: object) -> None:
        self._count -= 1
        self._gauge.dec()


class InFlightLimit:
    """Refuses predictions beyond a number at the same time, before their bodies are read.

    endpoints: the paths that predict, as the routes have them.
    """

    def __init__(self, app: ASGIApp, endpoints: Sequence[str], in_flight: InFlight) -> None:
        self._app, self._in_flight = app, in_flight
        self._endpoints = [(compile_path(endpoint)[0], endpoint) for endpoint in endpoints]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoint(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        exchange_of(scope).endpoint = endpoint
        with self._in_flight:
            await self._app(scope, receive, send)

    def _endpoint(self, path: str) -> str | None:
        return next((endpoint for pattern, endpoint in self._endpoints if pattern.match(path)), None)


class Innermost:
    """An endpoint as an ASGI application, with no router before it."""

    def __init__(self, endpoint: Callable[[Request], Awaitable[Response]]) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._endpoint(Request(scope, receive))
        await response(scope, receive, send)


def refusal(error: Exception, scope: Scope, **more: object) -> Response:
    """The answer to a request that fails, its code noted as the outcome. `more`: more fields of the body."""
    exchange = exchange_of(scope)
    found = problem(error)
    exchange.outcome = found.kind.code
    if scope["path"].startswith(INFERENCE_PREFIX):
        more["error"] = f"{found.message} {found.remedy}"
    return found.response(exchange.request_id, **more)


async def _answer(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """The error's body, unless an answer has begun."""
    exchange = exchange_of(scope)
    response = refusal(error, scope)
    if exchange.outcome == INTERNAL.code:
        log.error("request failed", exc_info=error, extra={"request_id": exchange.request_id})
    if not exchange.status:
        await response(scope, receive, send)


def _tagging(exchange: Exchange, send: Send) -> Send:
    """`send` that adds the request id to the headers and notes the status."""
    tag = (b"x-request-id", exchange.request_id.encode())

    async def tagged(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            message["headers"].append(tag)
        await send(message)

    return tagged


def _request_id(headers: dict[bytes, bytes]) -> str:
    sent = headers.get(b"x-request-id")
    return sent.decode() if sent and SANE_REQUEST_ID.fullmatch(sent) else os.urandom(8).hex()


def _bytes_declared(declared: bytes) -> int:
    if not declared.isdigit() or len(declared) > 18:
        raise RequestInvalid("Content-Length is no number of bytes.", remedy="Send the body's length.")
    return int(declared)
