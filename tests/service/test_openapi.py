"""The documentation that programs read: its examples run, its models describe what is answered.

.venv/bin/python -m pytest tests/service/test_openapi.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from model_store.store import open_store
from service import examples
from service.app import create_app
from service.problems import KINDS
from service.settings import Settings
from tests.service.in_process import running_app
from tests.toy_version import toy_version
from traces.spec import RoutingSpec

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose model has the shape of the one that ships."""
    root = tmp_path_factory.mktemp("openapi")
    spec = RoutingSpec(examples.MODEL, num_layers=24, num_experts=32, top_k=4)
    open_store(root).publish(*toy_version(spec), aliases=["production"])
    return root


@pytest.fixture
async def shipped(store: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with running_app(Settings(store=str(store), provider="cpu")) as client:
        yield client


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def checked(document: dict[str, Any], name: str, instance: object) -> None:
    """Raises where `instance` is not what the document's schema of that name says."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.validate(instance, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", examples.PREDICT)
async def test_every_example_is_answered_as_described(
    shipped: httpx.AsyncClient, document: dict[str, Any], name: str
) -> None:
    request = examples.PREDICT[name]["value"]
    checked(document, "PredictRequest", request)
    response = await shipped.post("/v1/predict", json=request)
    assert response.status_code == 200, response.text
    checked(document, "PredictResponse", response.json())


def test_the_examples_are_in_the_document(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert content["examples"] == examples.PREDICT


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/models", "ModelList"), (f"/v1/models/{examples.MODEL}/versions", "VersionList")]
)
async def test_lists_are_answered_as_described(
    shipped: httpx.AsyncClient, document: dict[str, Any], path: str, name: str
) -> None:
    checked(document, name, (await shipped.get(path)).json())


async def test_errors_are_answered_as_described(shipped: httpx.AsyncClient, document: dict[str, Any]) -> None:
    checked(document, "ErrorBody", (await shipped.post("/v1/predict", json={})).json())


async def test_an_unready_service_answers_as_described(store: Path, document: dict[str, Any]) -> None:
    async with running_app(Settings(store=str(store / "missing")), until_ready=False) as client:
        response = await client.get("/readyz")
    assert response.status_code == 503
    checked(document, "NotReadyBody", response.json())


def test_every_status_that_a_prediction_may_have_is_described(document: dict[str, Any]) -> None:
    described = set(document["paths"]["/v1/predict"]["post"]["responses"])
    assert described == {"200", *(str(kind.status) for kind in KINDS.values())} - {"426", "500"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = str(document).split("#/components/schemas/")[1:]
    assert {reference.partition("'")[0] for reference in found} <= set(document["components"]["schemas"])


async def test_the_document_is_served(shipped: httpx.AsyncClient, document: dict[str, Any]) -> None:
    assert (await shipped.get("/openapi.json")).json() == document
