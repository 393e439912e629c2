"""The endpoints: what comes is handed on, what comes back is sent. All async: a thread would cost too much.

curl localhost:8080/docs
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from service import examples
from service.errors import BodyLate, MediaTypeUnsupported, ModelNotReady
from service.metrics import Metrics
from service.middleware import exchange_of
from service.models import model_summary, version_list
from service.predictions import Predictions
from service.problems import problem
from service.schemas import ErrorBody, ModelList, NotReadyBody, PredictResponse, VersionList
from service.serving import WAIT, Serving

JSON = "application/json"
PREDICT_PATH = "/v1/predict"

_PREDICT_ERRORS = {
    404: "The model is not served, or has no such version.",
    408: "The body did not arrive in time.",
    413: "The body or the batch is too large.",
    415: "The body is not JSON.",
    422: "The body is not what is described here.",
    429: "Too many predictions are in flight. See `Retry-After`.",
    503: "The model is not ready, or the version is refused.",
}
_VERSIONS_ERRORS = {
    404: "The model is not served.",
    422: "limit is out of range.",
    503: "The store does not answer.",
}


class DirectRoute(APIRoute):
    """Hands the request to its endpoint as it is: looking for parameters that it has not took 50 µs."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint."""
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def predict_routes(predictions: Predictions, body_timeout_seconds: float) -> APIRouter:
    """POST /v1/predict. It reads the body itself: FastAPI would make a dict of it before pydantic sees it."""
    router = APIRouter(tags=["predictions"], route_class=DirectRoute)

    @router.post(
        PREDICT_PATH,
        summary="Which experts will these sequences need?",
        response_model=None,
        responses={200: {"model": PredictResponse}, **_errors(_PREDICT_ERRORS)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    JSON: {
                        "schema": {"$ref": "#/components/schemas/PredictRequest"},
                        "examples": examples.PREDICT,
                    }
                },
            }
        },
    )
    async def predict(request: Request) -> Response:
        exchange = exchange_of(request.scope)
        _require_json(exchange.headers)
        body = await _body(request, body_timeout_seconds)
        return Response(await predictions.answer(body, exchange), media_type=JSON)

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
        exchange = exchange_of(request.scope)
        found = problem(ModelNotReady(f"Not ready: {', '.join(sorted(reasons))}.", remedy=WAIT))
        exchange.outcome = found.kind.code
        return found.response(exchange.request_id, reasons=reasons)

    @router.get("/metrics", summary="For Prometheus", response_model=None, response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


async def _body(request: Request, timeout_seconds: float) -> bytes:
    try:
        async with asyncio.timeout(timeout_seconds):
            return await request.body()
    except TimeoutError:
        raise BodyLate(
            f"The body did not arrive within {timeout_seconds:g} s.",
            remedy="Send it faster, or raise SPECMOE_BODY_TIMEOUT_SECONDS.",
        ) from None


def _require_json(headers: dict[bytes, bytes]) -> None:
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type != JSON.encode():
        raise MediaTypeUnsupported(
            f"Content-Type is {media_type.decode('latin-1')[:60] or 'missing'}, expected {JSON}.",
            remedy=f"Send JSON with the header Content-Type: {JSON}.",
        )
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding != b"identity":
        raise MediaTypeUnsupported(
            f"Content-Encoding is {encoding.decode('latin-1')[:60]}, expected none.",
            remedy="Send plain JSON.",
        )


def _json(body: BaseModel) -> Response:
    return Response(orjson.dumps(body.model_dump(mode="json")), media_type=JSON)


def _errors(descriptions: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": text} for status, text in descriptions.items()}
