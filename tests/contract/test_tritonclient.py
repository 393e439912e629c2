"""NVIDIA's own client of the Open Inference Protocol against the real service, in a process of its own.

.venv/bin/python -m pytest tests/contract/test_tritonclient.py
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as asynchronous

from model_store.store import open_store
from speculation.runtime import Speculator, load_speculator
from tests.contract.running import running_service
from tests.service.inferring import DATATYPES, EXPERTS, LAYERS, made_up
from tests.toy_version import toy_version
from traces.spec import RoutingSpec

PAGE = Path(__file__).parents[2] / "docs" / "rest-api.md"
SHIPPED = RoutingSpec(model="gpt-oss-20b", num_layers=24, num_experts=32, top_k=4)


@pytest.fixture(scope="module")
def url(store: Path) -> Iterator[str]:
    with running_service(store) as reached:
        yield reached["base_url"].removeprefix("http://")


@pytest.fixture
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(url) as client:
        yield client


@pytest.fixture(scope="module")
def speculator(store: Path) -> Speculator:
    return load_speculator("toy", store=store, provider="cpu")


def tensors(arrays: dict[str, np.ndarray], *, binary: bool = True) -> list[triton.InferInput]:
    """The arrays as the client takes them."""
    return [
        triton.InferInput(name, list(array.shape), DATATYPES[array.dtype.name]).set_data_from_numpy(
            array, binary_data=binary
        )
        for name, array in arrays.items()
    ]


def in_process(speculator: Speculator, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What the Speculator says without any service."""
    state = (arrays["average"], arrays["last_token"])
    return speculator.predict(state, arrays["token_id"], arrays["experts"], arrays["gates"])


def test_the_client_finds_the_service_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("toy")
    assert client.is_model_ready("toy", "1")
    assert not client.is_model_ready("toy", "9")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]


def test_the_metadata_is_enough_to_write_a_request(
    client: triton.InferenceServerClient, speculator: Speculator
) -> None:
    metadata = client.get_model_metadata("toy")
    arrays = made_up(2)
    inputs = []
    for tensor in metadata["inputs"]:
        shape = [2 if size == -1 else size for size in tensor["shape"]]
        written = triton.InferInput(tensor["name"], shape, tensor["datatype"])
        inputs.append(written.set_data_from_numpy(arrays[tensor["name"]]))
    (output,) = metadata["outputs"]
    answer = client.infer("toy", inputs).as_numpy(output["name"])
    np.testing.assert_allclose(answer, in_process(speculator, arrays), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("binary_output", [True, False], ids=["bytes", "JSON"])
@pytest.mark.parametrize("binary_input", [True, False], ids=["from bytes", "from JSON"])
def test_an_inference_is_what_the_version_says_in_process(
    client: triton.InferenceServerClient,
    speculator: Speculator,
    batch: int,
    binary_input: bool,
    binary_output: bool,
) -> None:
    arrays = made_up(batch)
    result = client.infer(
        "toy",
        tensors(arrays, binary=binary_input),
        "production",
        [triton.InferRequestedOutput("probabilities", binary_data=binary_output)],
        request_id="step-17",
    )
    answer = result.as_numpy("probabilities")
    assert (answer.dtype, answer.shape) == (np.float32, (batch, LAYERS, EXPERTS))
    np.testing.assert_allclose(answer, in_process(speculator, arrays), atol=1e-6)
    told = result.get_response()
    assert (told["model_name"], told["model_version"], told["id"]) == ("toy", "2", "step-17")


def test_the_asynchronous_client_is_answered_alike(url: str, speculator: Speculator) -> None:
    arrays = made_up(3)

    async def ask() -> np.ndarray:
        async with asynchronous.InferenceServerClient(url) as client:
            result = await client.infer("toy", tensors(arrays))
            answer: np.ndarray = result.as_numpy("probabilities")
            return answer

    np.testing.assert_allclose(asyncio.run(ask()), in_process(speculator, arrays), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "version", "message"),
    [
        ("other", "", r"\[404\] This service does not serve that model. It serves: toy. Ask for"),
        ("toy", "9", r"\[404\] "),
        ("toy", "", r"\[422\] experts is INT32 \[1, 3, 2\], expected INT32 \[1, 4, 2\]. GET /v2/models"),
    ],
)
def test_the_client_shows_what_is_wrong_and_what_to_do(
    client: triton.InferenceServerClient, model: str, version: str, message: str
) -> None:
    wrong = {"experts": np.zeros((1, 3, 2), np.int32)}
    with pytest.raises(triton.InferenceServerException, match=message):
        client.infer(model, tensors(wrong), version)


def test_the_example_of_the_page_runs(tmp_path: Path, capsys: Any) -> None:
    open_store(tmp_path).publish(*toy_version(SHIPPED))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "tritonclient" in block)
    with running_service(tmp_path) as reached:
        code = example.replace("127.0.0.1:8080", reached["base_url"].removeprefix("http://"))
        exec(compile(code, str(PAGE), "exec"), {})
    assert re.search(r"layer 2 will probably need \[ *\d+ +\d+ +\d+ +\d+ *\]", capsys.readouterr().out)
