"""The endpoints of the Open Inference Protocol, version 2: what KServe's and Triton's clients speak.

Only predict is here, as it is: one token of each sequence, state and all, and no ranking. /v1 does the rest.

    curl localhost:8080/v2
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from model_store.documents import ALIAS_NAME, VERSION_NAME
from service import examples
from service.errors import ModelNotReady, RequestInvalid
from service.explain import shown
from service.inference import Inference, signature
from service.inference_schemas import (
    InferenceErrorBody,
    InferResponse,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from service.middleware import exchange_of
from service.routes import JSON, DirectRoute, read_body, refuse_encoding
from service.serving import WAIT, Serving
from service.tensors import TensorSpec

MODEL_PATH = "/v2/models/{model}"
VERSION_PATH = f"{MODEL_PATH}/versions/{{version}}"
INFER_PATHS = (f"{MODEL_PATH}/infer", f"{VERSION_PATH}/infer")
BYTES = "application/octet-stream"
# The length of the JSON that a body begins with, where bytes follow it.
JSON_BYTES_HEADER = "Inference-Header-Content-Length"

_PARAMETERS = {
    "model": "A name that /v1/models lists.",
    "version": "A version or an alias; where the path has none, the one that is served.",
}
_MODEL_ERRORS = {
    404: "The model is not served, or has no such version.",
    422: "The version in the path is neither a number nor an alias.",
    503: "The model is not ready, the version is refused, or the store does not answer.",
}
_INFER_ERRORS = _MODEL_ERRORS | {
    408: "The body did not arrive in time.",
    413: "The body or the batch is too large.",
    415: "The body is compressed.",
    422: "The body is not what is described here.",
    429: "Too many predictions are in flight. See `Retry-After`.",
}
_INFER_BODY = {
    "required": True,
    "description": f"JSON; or {JSON_BYTES_HEADER} bytes of JSON, then the tensors with a binary_data_size.",
    "content": {
        JSON: {"schema": {"$ref": "#/components/schemas/InferRequest"}, "examples": examples.INFER},
        BYTES: {"schema": {"type": "string", "format": "binary"}},
    },
}


def inference_routes(inference: Inference, serving: Serving, body_timeout_seconds: float) -> APIRouter:
    """Everything below /v2."""
    router = APIRouter(tags=["Open Inference Protocol"], route_class=DirectRoute)
    _add_server_routes(router, serving)
    _add_model_routes(router, serving)

    async def infer(request: Request) -> Response:
        # Content-Type says nothing that the header with the JSON's length does not, and clients send none.
        exchange = exchange_of(request.scope)
        refuse_encoding(exchange.headers)
        json_bytes = _json_bytes(exchange.headers)
        body = await read_body(request, body_timeout_seconds)
        answer = await inference.answer(*_named(request), body, json_bytes, exchange)
        if answer.json_bytes is None:
            return Response(answer.body, media_type=JSON)
        return Response(answer.body, 200, {JSON_BYTES_HEADER: str(answer.json_bytes)}, BYTES)

    for path in INFER_PATHS:
        router.add_api_route(
            path,
            infer,
            methods=["POST"],
            summary="Run predict",
            response_model=None,
            responses=_responses(InferResponse, _INFER_ERRORS),
            openapi_extra=_parameters(path) | {"requestBody": _INFER_BODY},
        )
    return router


def _add_server_routes(router: APIRouter, serving: Serving) -> None:
    @router.get("/v2", summary="Who answers", response_model=None, responses=_responses(ServerMetadata))
    async def server(request: Request) -> Response:
        return _json(
            ServerMetadata(name="specmoe", version=request.app.version, extensions=["binary_tensor_data"])
        )

    @router.get(
        "/v2/health/live",
        summary="The process answers",
        response_model=None,
        responses=_responses(ServerLive),
    )
    async def live(_request: Request) -> Response:
        return _json(ServerLive(live=True))

    @router.get(
        "/v2/health/ready",
        summary="Every configured model is loaded, warmed up and checked",
        response_model=None,
        responses=_responses(ServerReady, {503: "Something is not ready."}),
    )
    async def ready(_request: Request) -> Response:
        if reasons := serving.unready():
            raise ModelNotReady(f"Not ready: {', '.join(sorted(reasons))}.", remedy=WAIT)
        return _json(ServerReady(ready=True))


def _add_model_routes(router: APIRouter, serving: Serving) -> None:
    async def metadata(request: Request) -> Response:
        model, selector = _named(request)
        tensors = signature((await serving.get(model, selector)).speculator)
        return _json(
            ModelMetadata(
                name=model,
                versions=[str(version) for version in serving.find(model).versions],
                platform="onnxruntime_onnx",
                inputs=[_described(tensor) for tensor in tensors.inputs],
                outputs=[_described(tensors.output)],
            )
        )

    async def ready(request: Request) -> Response:
        model, selector = _named(request)
        await serving.get(model, selector)
        return _json(ModelReady(name=model, ready=True))

    for path in (MODEL_PATH, VERSION_PATH):
        for suffix, endpoint, summary, model in (
            ("", metadata, "What predict takes and gives", ModelMetadata),
            ("/ready", ready, "The version is loaded, warmed up and checked", ModelReady),
        ):
            router.add_api_route(
                path + suffix,
                endpoint,
                summary=summary,
                response_model=None,
                responses=_responses(model, _MODEL_ERRORS),
                openapi_extra=_parameters(path),
            )


def _named(request: Request) -> tuple[str, int | str | None]:
    """(model, version or alias) as the path has them. Raises RequestInvalid."""
    version = request.path_params.get("version")
    if version is None or ALIAS_NAME.fullmatch(version):
        return request.path_params["model"], version
    if VERSION_NAME.fullmatch(version):
        return request.path_params["model"], int(version)
    raise RequestInvalid(
        f"The version in the path is {shown(repr(version))}, expected a number from 1 up or an alias.",
        remedy="The model's metadata lists the versions; leave /versions/... out for the one that is served.",
    )


def _json_bytes(headers: dict[bytes, bytes]) -> int | None:
    declared = headers.get(JSON_BYTES_HEADER.lower().encode())
    if declared is None:
        return None
    if not declared.isdigit() or len(declared) > 18:
        raise RequestInvalid(
            f"{JSON_BYTES_HEADER} is {shown(repr(declared.decode('latin-1')))}, expected a number of bytes.",
            remedy="Say the length of the JSON, with which the body begins.",
        )
    return int(declared)


def _described(tensor: TensorSpec) -> Any:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": [-1, *tensor.shape]}


def _json(body: BaseModel) -> Response:
    return Response(orjson.dumps(body.model_dump()), media_type=JSON)


def _responses(
    model: type[BaseModel], errors: Mapping[int, str] = MappingProxyType({})
) -> dict[int | str, dict[str, Any]]:
    described: dict[int | str, dict[str, Any]] = {200: {"model": model}}
    for status, text in sorted(errors.items()):
        described[status] = {"model": InferenceErrorBody, "description": text}
    return described


def _parameters(path: str) -> dict[str, Any]:
    """The path's parameters, which FastAPI cannot see: the endpoints look them up themselves."""
    return {
        "parameters": [
            {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
            for name, text in _PARAMETERS.items()
            if f"{{{name}}}" in path
        ]
    }
