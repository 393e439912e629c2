"""/v2 for a version that reads a hidden state: one tensor more, by its name.

.venv/bin/python -m pytest tests/service/test_hidden_inference.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from model_store.store import open_store
from service.settings import Settings
from speculation.runtime import Speculator, load_speculator
from tests.service.in_process import running_app
from tests.service.inferring import PATH, as_json, binary_body, made_up
from tests.toy_version import toy_version

pytestmark = pytest.mark.anyio
SIZE = 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hidden") / "store"
    open_store(folder).publish(*toy_version(steps=True, hidden_size=SIZE))
    return folder


@pytest.fixture(scope="module")
def speculator(store: Path) -> Speculator:
    return load_speculator("toy", store=store, provider="cpu")


@pytest.fixture
async def reader(store: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with running_app(Settings(store=str(store), provider="cpu")) as client:
        yield client


@pytest.mark.parametrize("in_bytes", [False, True], ids=["JSON", "bytes"])
async def test_it_is_told_by_name_or_left_out(
    reader: httpx.AsyncClient, speculator: Speculator, in_bytes: bool
) -> None:
    arrays = made_up(3)
    hidden = np.random.default_rng(1).normal(size=(3, SIZE)).astype(np.float32)
    state = (arrays["average"], arrays["last_token"])
    question = (state, arrays["token_id"], arrays["experts"], arrays["gates"])
    for told in ({"hidden": hidden}, {}):
        inputs = arrays | told
        if in_bytes:
            body, headers = binary_body(inputs)
            response = await reader.post(PATH, content=body, headers=headers)
        else:
            response = await reader.post(PATH, json={"inputs": [as_json(n, a) for n, a in inputs.items()]})
        (output,) = response.json()["outputs"]
        expected = speculator.predict(*question, *told.values())
        np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), expected, atol=1e-6)


async def test_metadata_tells_its_size(reader: httpx.AsyncClient) -> None:
    inputs = {tensor["name"]: tensor for tensor in (await reader.get("/v2/models/toy")).json()["inputs"]}
    assert (inputs["hidden"]["datatype"], inputs["hidden"]["shape"]) == ("FP32", [-1, SIZE])


async def test_what_cannot_be_one_is_refused(reader: httpx.AsyncClient) -> None:
    experts = made_up(2)["experts"]
    for hidden, told in (
        (np.zeros((2, SIZE + 1), np.float32), "expected FP32 [2, 5]"),
        (np.full((2, SIZE), np.inf, np.float32), "not finite"),
    ):
        body, headers = binary_body({"experts": experts, "hidden": hidden})
        response = await reader.post(PATH, content=body, headers=headers)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
        assert told in response.json()["message"]


async def test_a_version_that_reads_none_knows_no_such_input(client: httpx.AsyncClient) -> None:
    body, headers = binary_body({"experts": made_up(1)["experts"], "hidden": np.zeros((1, SIZE), np.float32)})
    response = await client.post(PATH, content=body, headers=headers)
    assert response.status_code == 422 and "inputs has 'hidden'" in response.json()["message"]
