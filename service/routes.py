"""The endpoints: what comes is handed on, what comes back is sent. All async: a thread would cost too much.

curl localhost:8080/docs
"""

from __future__ import annotations

import asyncio
import functools
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Annotated, Any, TypeAlias

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from service import examples
from service.errors import BodyLate, MediaTypeUnsupported, ModelNotReady
from service.metrics import Metrics
from service.middleware import exchange_of, refusal
from service.models import model_summary, version_list
from service.predictions import Predictions
from service.schemas import ErrorBody, ModelList, NotReadyBody, PredictResponse, VersionList
from service.serving import WAIT, Serving
from service.stream import once
from service.stream.host import Streams

JSON = "application/json"
FRAMES = "application/octet-stream"
_FRAMES_SCHEMA = {
    "type": "string",
    "format": "binary",
    "description": "The stream's messages, each behind its length: docs/rest-api.md.",
}
PREDICT_PATH = "/v1/predict"

_PREDICT_ERRORS = {
    400: "A body of frames cannot be read.",
    404: "The model is not served, or has no such version.",
    408: "The body did not arrive in time.",
    413: "The body or the batch is too large.",
    415: "The body is neither JSON nor frames.",
    422: "The body is not what is described here.",
    429: "Too many predictions are in flight. See `Retry-After`.",
    503: "The model is not ready, or the version is refused.",
}
_VERSIONS_ERRORS = {
    404: "The model is not served.",
    422: "limit is out of range.",
    503: "The store does not answer.",
}


Endpoint: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]


class DirectRoute(APIRoute):
    """Hands the request to its endpoint as it is: looking for parameters that it has not took 50 µs."""

    def get_route_handler(self) -> Endpoint:
        """The endpoint."""
        endpoint: Endpoint = self.endpoint
        return endpoint


def predict_endpoint(predictions: Predictions, streams: Streams, body_timeout_seconds: float) -> Endpoint:
    """What answers POST /v1/predict. It reads the body itself: FastAPI would make a dict of it first."""

    async def predict(request: Request) -> Response:
        exchange = exchange_of(request.scope)
        media_type = _media_type(exchange.headers)
        body = await read_body(request, body_timeout_seconds)
        if media_type == JSON:
            return Response(await predictions.answer(body, exchange), media_type=JSON)
        frames, exchange.running = await once.answer(body, streams)
        return Response(frames, media_type=FRAMES)

    return predict


def predict_routes(endpoint: Endpoint) -> APIRouter:
    """POST /v1/predict, as OpenAPI tells it; requests come to the endpoint by `service.app.Service`."""
    router = APIRouter(tags=["predictions"], route_class=DirectRoute)
    router.post(
        PREDICT_PATH,
        summary="Which experts will these sequences need?",
        response_model=None,
        responses={
            200: {"model": PredictResponse, "content": {FRAMES: {"schema": _FRAMES_SCHEMA}}},
            **_errors(_PREDICT_ERRORS),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    JSON: {
                        "schema": {"$ref": "#/components/schemas/PredictRequest"},
                        "examples": examples.PREDICT,
                    },
                    FRAMES: {"schema": _FRAMES_SCHEMA},
                },
            }
        },
    )(endpoint)
    return router


def model_routes(serving: Serving) -> APIRouter:
    """GET /v1/models and what lies below."""
    router = APIRouter(tags=["models"])

    @router.get(
        "/v1/models", summary="What is served", response_model=None, responses={200: {"model": ModelList}}
    )
    async def models() -> Response:
        served = serving.models().values()
        return _json(ModelList(models=[model_summary(serving, model) for model in served]))

    @router.get(
        "/v1/models/{model}/versions",
        summary="What lies in the store",
        response_model=None,
        responses={
            200: {"model": VersionList},
            **_errors(
                {
                    404: "The model is not served.",
                    422: "limit is out of range.",
                    503: "The store does not answer.",
                }
            ),
        },
    )
    async def versions(model: str, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Response:
        return _json(await version_list(serving, model, limit))

    return router


def health_routes(serving: Serving, metrics: Metrics) -> APIRouter:
    """What an orchestrator and Prometheus ask."""
    router = APIRouter(tags=["health"])

    @router.get("/livez", summary="The process answers", response_model=None)
    async def livez() -> Response:
        return Response(b'{"status":"alive"}', media_type=JSON)

    @router.get(
        "/readyz",
        summary="Every configured model is loaded, warmed up and checked",
        response_model=None,
        responses={503: {"model": NotReadyBody, "description": "Something is not ready."}},
    )
    async def readyz(request: Request) -> Response:
        reasons = serving.unready()
        if not reasons:
            return Response(b'{"status":"ready"}', media_type=JSON)
        error = ModelNotReady(f"Not ready: {', '.join(sorted(reasons))}.", remedy=WAIT)
        return refusal(error, request.scope, reasons=reasons)

    @router.get("/metrics", summary="For Prometheus", response_model=None, response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


async def read_body(request: Request, timeout_seconds: float) -> bytes:
    """The whole body. Raises BodyLate."""
    reading = request.body()
    try:
        waited_for = reading.send(None)
    except StopIteration as whole:  # it came with its headers, as most do: a timer costs more than parsing it
        body: bytes = whole.value
        return body
    try:
        async with asyncio.timeout(timeout_seconds):
            return await _rest_of(reading, waited_for)
    except TimeoutError:
        raise BodyLate(
            f"The body did not arrive within {timeout_seconds:g} s.",
            remedy="Send it faster, or raise SPECMOE_BODY_TIMEOUT_SECONDS.",
        ) from None


@types.coroutine
def _rest_of(begun: Coroutine[Any, Any, bytes], waited_for: Any) -> Generator[Any, Any, bytes]:
    """What a coroutine gives that was begun by hand and now waits for something."""
    while True:
        try:
            came = yield waited_for
        except BaseException as error:
            step = functools.partial(begun.throw, error)
        else:
            step = functools.partial(begun.send, came)
        try:
            waited_for = step()
        except StopIteration as whole:
            return whole.value  # type: ignore[no-any-return]


def _media_type(headers: dict[bytes, bytes]) -> str:
    """JSON or FRAMES. Raises MediaTypeUnsupported."""
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
    if media_type not in (JSON, FRAMES):
        raise MediaTypeUnsupported(
            f"Content-Type is {media_type[:60] or 'missing'}, expected {JSON} or {FRAMES}.",
            remedy=f"Send JSON with the header Content-Type: {JSON}.",
        )
    refuse_encoding(headers)
    return media_type


def refuse_encoding(headers: dict[bytes, bytes]) -> None:
    """Raises MediaTypeUnsupported where the body is compressed: how large it is would show too late."""
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding != b"identity":
        raise MediaTypeUnsupported(
            f"Content-Encoding is {encoding.decode('latin-1')[:60]}, expected none.",
            remedy="Send it as it is.",
        )


def _json(body: BaseModel) -> Response:
    return Response(orjson.dumps(body.model_dump(mode="json")), media_type=JSON)


def _errors(descriptions: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": text} for status, text in descriptions.items()}
