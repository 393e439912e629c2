"""The application, put together from its parts.

settings, store -> `create_app` -> routes -> predictions, models, metrics

    specmoe serve
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from model_store.store import Store, open_store
from service.explain import explained
from service.inference import Inference
from service.inference_protocol import INFER_PATHS, inference_routes
from service.inference_schemas import INFER_REQUEST
from service.metrics import Metrics
from service.middleware import BodyLimit, InFlight, InFlightLimit, Innermost, RequestScope, refusal
from service.predictions import Predictions
from service.routes import PREDICT_PATH, health_routes, model_routes, predict_endpoint, predict_routes
from service.schemas import PREDICT_REQUEST
from service.serving import Serving
from service.settings import Settings
from service.stream.host import Streams
from service.stream.routes import stream_routes


def create_app(settings: Settings, store: Store | None = None) -> FastAPI:
    """An app that serves `store` (None: the one in the settings). It reads nothing before it is started."""
    metrics = Metrics()
    serving = Serving(store or open_store(settings.store), settings, metrics)
    predictions = Predictions(serving, settings)
    streams = Streams(serving, settings, metrics)
    app = Service(
        title="specMoE",
        summary="Which experts will a mixture-of-experts model need next?",
        version=_own_version(),
        lifespan=_lifespan(serving, predictions, streams),
        redoc_url=None,
        redirect_slashes=False,
    )
    predict = predict_endpoint(predictions, streams, settings.body_timeout_seconds)
    app.include_router(predict_routes(predict))
    app.include_router(model_routes(serving))
    app.include_router(stream_routes(streams, serving))
    app.include_router(health_routes(serving, metrics))
    inference = Inference(serving, settings, predictions.workers)
    app.include_router(inference_routes(inference, serving, settings.body_timeout_seconds))
    app.state.streams = streams
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_parameters)
    in_flight = InFlight(settings.max_in_flight, metrics)

    def within_limits(inner: ASGIApp) -> ASGIApp:
        limited = BodyLimit(inner, settings.max_body_bytes)
        counted = InFlightLimit(limited, (PREDICT_PATH, *INFER_PATHS), in_flight)
        return RequestScope(counted, metrics, settings.access_log_share)

    app.add_middleware(within_limits)
    app.prediction = within_limits(Innermost(predict))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class Service(FastAPI):
    """FastAPI, but for the one request that is asked thousands of times a second.

    FastAPI's own way to an endpoint, through its middleware, exit stacks, routes and their parameters, takes
    longer than the model. `prediction` answers POST /v1/predict within the same limits.
    """

    prediction: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PREDICT_PATH and scope["method"] == "POST":
            await self.prediction(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _lifespan(serving: Serving, predictions: Predictions, streams: Streams) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        running = [asyncio.create_task(work) for work in (serving.run(), streams.run())]
        try:
            yield
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            predictions.close()
            serving.loader.close()

    return lifespan


async def _refuse(request: Request, error: Exception) -> Response:
    """What the router refuses: a path or a method."""
    return refusal(error, request.scope)


async def _refuse_parameters(request: Request, error: Exception) -> Response:
    """What FastAPI refuses: a parameter in the path or behind the question mark."""
    problems = error.errors() if isinstance(error, RequestValidationError) else ()
    return await _refuse(request, explained(problems))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, and the models of the bodies that endpoints read by themselves."""
    if app.openapi_schema is None:
        described = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        for name, body in (("PredictRequest", PREDICT_REQUEST), ("InferRequest", INFER_REQUEST)):
            request = body.json_schema(ref_template="#/components/schemas/{model}")
            parts = request.pop("$defs", {})
            described["components"]["schemas"] |= {name: request, **parts}
        app.openapi_schema = described
    return app.openapi_schema


def _own_version() -> str:
    try:
        return version("specmoe")
    except PackageNotFoundError:  # run from a folder that was not installed
        return "0"
