"""/v2, the Open Inference Protocol: what it tells, what infer answers, against the Speculator itself.

.venv/bin/python -m pytest tests/service/test_inference_protocol.py
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from model_store.store import open_store
from service import examples
from service.app import create_app
from service.settings import Settings
from speculation.runtime import Speculator, load_speculator
from tests.service.in_process import running_app
from tests.service.inferring import (
    EXPERTS,
    HEADER,
    LAYERS,
    PATH,
    TOP_K,
    as_bytes,
    as_json,
    binary_body,
    made_up,
)
from tests.service.test_middleware import sample
from tests.toy_version import toy_version
from traces.spec import RoutingSpec

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def speculator(shared_store: Path) -> Speculator:
    return load_speculator("toy", store=shared_store, provider="cpu")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def reference(speculator: Speculator, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What the Speculator says in this process."""
    experts = arrays["experts"]
    state = speculator.initial_state(len(experts))
    if "average" in arrays:
        state = (arrays["average"], arrays["last_token"])
    return speculator.predict(state, arrays.get("token_id"), experts, arrays.get("gates"))


def probabilities(response: httpx.Response) -> np.ndarray:
    """The output of a request that must succeed, however it was sent."""
    assert response.status_code == 200, response.text
    length = response.headers.get(HEADER)
    answer = (
        response.json()
        if length is None
        else httpx.Response(200, content=response.content[: int(length)]).json()
    )
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"]) == ("probabilities", "FP32")
    if length is None:
        flat = np.array(output["data"], np.float32)
    else:
        assert response.headers["content-type"] == "application/octet-stream"
        flat = np.frombuffer(response.content[int(length) :], "<f4")
        assert output["parameters"] == {"binary_data_size": flat.nbytes}
    return flat.reshape(output["shape"])


async def infer(client: httpx.AsyncClient, *inputs: dict[str, Any], **fields: Any) -> httpx.Response:
    return await client.post(PATH, json={"inputs": list(inputs), **fields})


async def test_the_server_tells_who_it_is(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v2")).json()
    assert answer["name"] == "specmoe"
    assert answer["extensions"] == ["binary_tensor_data"]


async def test_a_model_tells_the_inputs_of_its_manifest(
    client: httpx.AsyncClient, speculator: Speculator
) -> None:
    answer = (await client.get("/v2/models/toy")).json()
    assert (answer["name"], answer["versions"], answer["platform"]) == ("toy", ["1", "2"], "onnxruntime_onnx")
    told = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in answer["inputs"]}
    assert list(told) == ["token_id", "experts", "gates", *(t.name for t in speculator.manifest.state)]
    assert told["token_id"] == ("INT64", [-1])
    assert told["experts"] == ("INT32", [-1, LAYERS, TOP_K])
    assert told["average"] == ("FP32", [-1, LAYERS, EXPERTS])
    assert answer["outputs"] == [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, LAYERS, EXPERTS]}
    ]


@pytest.mark.parametrize("version", ["1", "2", "production"])
async def test_a_version_is_named_by_number_or_alias(
    client: httpx.AsyncClient, shared_store: Path, version: str
) -> None:
    selector = int(version) if version.isdecimal() else version
    named = load_speculator("toy", version=selector, store=shared_store, provider="cpu")
    path = f"/v2/models/toy/versions/{version}"
    assert (await client.get(f"{path}/ready")).json() == {"name": "toy", "ready": True}
    assert (await client.get(path)).json() == (await client.get("/v2/models/toy")).json()
    arrays = made_up(1)
    response = await client.post(f"{path}/infer", json={"inputs": [as_json("experts", arrays["experts"])]})
    assert response.json()["model_version"] == str(named.manifest.version)
    expected = reference(named, {"experts": arrays["experts"]})
    np.testing.assert_allclose(probabilities(response), expected, atol=1e-6)


async def test_health_is_told(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    assert (await client.get("/v2/models/toy/ready")).json() == {"name": "toy", "ready": True}


@pytest.mark.parametrize("path", ["/v2/health/ready", "/v2/models/toy/ready", "/v2/models/toy"])
async def test_what_is_not_loaded_is_not_ready(tmp_path: Path, path: str) -> None:
    settings = Settings(store=str(tmp_path / "missing"))
    async with running_app(settings, until_ready=False) as client:
        response = await client.get(path)
        assert (await client.get("/v2/health/live")).status_code == 200
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")


@pytest.mark.parametrize("batch", [1, 3, 40], ids=["one", "inline", "on a thread"])
@pytest.mark.parametrize("binary_output", [False, True], ids=["to JSON", "to bytes"])
@pytest.mark.parametrize("binary_input", [False, True], ids=["from JSON", "from bytes"])
async def test_infer_is_predict(
    client: httpx.AsyncClient, speculator: Speculator, batch: int, binary_input: bool, binary_output: bool
) -> None:
    arrays = made_up(batch)
    fields = {"id": "step-17", "parameters": {"binary_data_output": binary_output}}
    if binary_input:
        body, headers = binary_body(arrays, **fields)
        response = await client.post(PATH, content=body, headers=headers)
    else:
        response = await infer(client, *(as_json(name, array) for name, array in arrays.items()), **fields)
    np.testing.assert_allclose(probabilities(response), reference(speculator, arrays), atol=1e-6)
    assert (HEADER in response.headers) == binary_output


async def test_inputs_of_both_kinds_come_together_in_any_order(
    client: httpx.AsyncClient, speculator: Speculator
) -> None:
    arrays = made_up(2)
    inputs = [
        as_bytes("gates", arrays["gates"]),
        as_json("token_id", arrays["token_id"]),
        as_bytes("experts", arrays["experts"]),
    ]
    body, headers = binary_body({}, inputs=inputs)
    behind = arrays["gates"].tobytes() + arrays["experts"].tobytes()
    response = await client.post(PATH, content=body + behind, headers=headers)
    told = {name: arrays[name] for name in ("token_id", "experts", "gates")}
    np.testing.assert_allclose(probabilities(response), reference(speculator, told), atol=1e-6)


async def test_data_may_be_nested_as_its_shape(client: httpx.AsyncClient, speculator: Speculator) -> None:
    experts = made_up(3)["experts"]
    response = await infer(client, as_json("experts", experts, data=experts.tolist()))
    np.testing.assert_allclose(
        probabilities(response), reference(speculator, {"experts": experts}), atol=1e-6
    )


@pytest.mark.parametrize("left_out", ["token_id", "gates", ("average", "last_token")], ids=str)
async def test_all_but_experts_may_be_left_out(
    client: httpx.AsyncClient, speculator: Speculator, left_out: str | tuple[str, ...]
) -> None:
    arrays = {name: array for name, array in made_up(2).items() if name not in left_out}
    response = await infer(client, *(as_json(name, array) for name, array in arrays.items()))
    np.testing.assert_allclose(probabilities(response), reference(speculator, arrays), atol=1e-6)


@pytest.mark.parametrize(
    ("of_output", "of_request", "binary"),
    [(None, None, False), (None, True, True), (False, True, False), (True, False, True), (True, None, True)],
)
async def test_the_output_says_how_it_comes_before_the_request_does(
    client: httpx.AsyncClient, of_output: bool | None, of_request: bool | None, binary: bool
) -> None:
    outputs = [{"name": "probabilities", "parameters": {"binary_data": of_output}}]
    parameters = {"binary_data_output": of_request}
    response = await infer(
        client, as_json("experts", made_up(1)["experts"]), outputs=outputs, parameters=parameters
    )
    assert probabilities(response).shape == (1, LAYERS, EXPERTS)
    assert (HEADER in response.headers) == binary


async def test_the_id_is_returned_and_none_is_made_up(client: httpx.AsyncClient) -> None:
    tensor = as_json("experts", made_up(1)["experts"])
    assert (await infer(client, tensor, id="17")).json()["id"] == "17"
    assert "id" not in (await infer(client, tensor)).json()


async def test_what_other_servers_read_is_let_pass(client: httpx.AsyncClient) -> None:
    tensor = as_json("experts", made_up(1)["experts"], parameters={"content_type": "np"})
    fields = {"model_name": "toy", "parameters": {"priority": 1}, "outputs": []}
    assert probabilities(await infer(client, tensor, **fields)).shape == (1, LAYERS, EXPERTS)


async def test_inferences_are_counted_and_timed_as_predictions_are(client: httpx.AsyncClient) -> None:
    await infer(client, as_json("experts", made_up(1)["experts"]))
    await infer(client)
    await client.post("/v2/models/unheard/versions/unheard/infer", content=b"{}")
    await client.get("/v2/models/toy/ready")
    text = (await client.get("/metrics")).text
    endpoint = "/v2/models/{model}/infer"
    for outcome in ("ok", "invalid_request"):
        assert sample(text, "specmoe_requests_total", endpoint=endpoint, outcome=outcome) == 1
    for histogram in ("specmoe_request_seconds_count", "specmoe_model_seconds_count"):
        assert sample(text, histogram, model="toy", version="2") == 1
    assert "unheard" not in text


async def test_inferences_count_among_the_predictions_in_flight(shared_store: Path) -> None:
    arrived, rest = asyncio.Event(), asyncio.Event()
    body, headers = binary_body(made_up(1))

    async def slow() -> AsyncIterator[bytes]:
        yield body[:10]
        arrived.set()
        await rest.wait()
        yield body[10:]

    async with running_app(Settings(store=str(shared_store), max_in_flight=1)) as client:
        first = asyncio.create_task(client.post(PATH, content=slow(), headers=headers))
        await arrived.wait()
        refused = [
            await client.post(PATH, content=b""),
            await client.post("/v2/models/toy/versions/2/infer", content=b""),
            await client.post("/v1/predict", json={}),
        ]
        told = (await client.get("/v2/models/toy")).status_code
        rest.set()
        finished = await first
    assert {(response.status_code, response.json()["code"]) for response in refused} == {(429, "overloaded")}
    assert "error" in refused[0].json()
    assert (told, finished.status_code) == (200, 200)


def checked(document: dict[str, Any], name: str, instance: object) -> None:
    """Raises where `instance` is not what the document's schema of that name says."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.validate(instance, schema, jsonschema.Draft202012Validator)


async def test_every_example_is_answered_as_described(tmp_path: Path, document: dict[str, Any]) -> None:
    spec = RoutingSpec(examples.MODEL, num_layers=24, num_experts=32, top_k=4)
    open_store(tmp_path).publish(*toy_version(spec))
    async with running_app(Settings(store=str(tmp_path), provider="cpu")) as client:
        for example in examples.INFER.values():
            checked(document, "InferRequest", example["value"])
            response = await client.post(f"/v2/models/{examples.MODEL}/infer", json=example["value"])
            assert probabilities(response).shape == (1, 24, 32)
            checked(document, "InferResponse", response.json())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v2", "ServerMetadata"),
        ("/v2/models/toy", "ModelMetadata"),
        ("/v2/models/toy/ready", "ModelReady"),
        ("/v2/models/none", "InferenceErrorBody"),
        ("/v2/nowhere", "InferenceErrorBody"),
    ],
)
async def test_answers_are_as_described(
    client: httpx.AsyncClient, document: dict[str, Any], path: str, name: str
) -> None:
    checked(document, name, (await client.get(path)).json())


def test_the_description_has_every_path_with_its_parameters(document: dict[str, Any]) -> None:
    paths = {path: methods for path, methods in document["paths"].items() if path.startswith("/v2")}
    assert len(paths) == 9
    for path, methods in paths.items():
        (method,) = methods.values()
        named = {parameter["name"] for parameter in method.get("parameters", [])}
        assert named == {name for name in ("model", "version") if f"{{{name}}}" in path}


def test_every_status_that_an_inference_may_have_is_described(document: dict[str, Any]) -> None:
    described = set(document["paths"][PATH.replace("toy", "{model}")]["post"]["responses"])
    assert described == {"200", "404", "408", "413", "415", "422", "429", "503"}
