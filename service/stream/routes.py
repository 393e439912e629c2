"""What is said of streams over REST: how their forecasts turn out, and that a stream wants a WebSocket.

curl localhost:8080/v1/models/gpt-oss-20b/live
"""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Response

from service.errors import UpgradeRequired
from service.schemas import ErrorBody, LiveReport
from service.serving import Serving
from service.stream.host import Streams
from service.stream.hub import Hub
from service.stream.websocket import PATH

JSON = "application/json"


def stream_routes(streams: Streams, serving: Serving) -> APIRouter:
    """GET /v1/stream, which tells plain HTTP what to do, and GET /v1/models/{model}/live."""
    router = APIRouter(tags=["stream"])

    @router.get(
        PATH,
        summary="WebSocket: routing in, forecasts out. See docs/stream-protocol.md",
        response_model=None,
        responses={426: {"model": ErrorBody, "description": "Plain HTTP came."}},
    )
    async def stream() -> Response:
        raise UpgradeRequired(
            "This path speaks WebSocket.", remedy="Connect with a WebSocket client: docs/stream-protocol.md."
        )

    @router.get(
        "/v1/models/{model}/live",
        summary="How good the streams' forecasts turn out to be",
        response_model=None,
        responses={
            200: {"model": LiveReport},
            404: {"model": ErrorBody, "description": "The model is not served."},
        },
    )
    async def live(model: str) -> Response:
        serving.find(model)
        body = {"model": model, "versions": [_scores(hub) for hub in streams.hubs(model)]}
        return Response(orjson.dumps(body), media_type=JSON)

    return router


def _scores(hub: Hub) -> dict[str, Any]:
    manifest = hub.running.speculator.manifest
    return {
        "version": hub.running.version,
        "tokens": hub.scores.tokens,
        "forecasts": hub.scores.forecasts,
        "distances": hub.scores.report(),
        "validation": manifest.metrics.get("validation", {}),
    }
