"""Around a request: its id, its limits, what is counted.

.venv/bin/python -m pytest tests/service/test_middleware.py
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.service.in_process import FINISHED, body, predict, running_app

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
SMALL = json.dumps(body()).encode()


@pytest.mark.parametrize("path", ["/livez", "/nowhere"])
async def test_a_sane_request_id_is_echoed(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path, headers={"x-request-id": "step-17.a_B"})
    assert response.headers.get_list("x-request-id") == ["step-17.a_B"]


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a\tb", "<script>", "é".encode("latin-1")])
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, sent: str | bytes) -> None:
    response = await client.get("/livez", headers=[("x-request-id", sent)])
    assert len(response.headers["x-request-id"]) == 16


async def test_requests_without_an_id_get_different_ones(client: httpx.AsyncClient) -> None:
    ids = {(await client.get("/livez")).headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
@pytest.mark.parametrize(("length", "status"), [(1024, 200), (1025, 413)], ids=["at the limit", "above it"])
async def test_a_body_is_limited_by_what_is_declared_and_by_what_arrives(
    shared_store: Path, length: int, status: int, chunked: bool
) -> None:
    padded = SMALL + b" " * (length - len(SMALL))
    content = chunks(padded[:600], padded[600:]) if chunked else padded
    async with running_app(Settings(store=str(shared_store), max_body_bytes=1024)) as client:
        response = await client.post("/v1/predict", content=content, headers=JSON)
    assert response.status_code == status
    assert status == 200 or response.json()["code"] == "body_too_large"


async def test_no_more_of_a_chunked_body_is_read_than_is_allowed(shared_store: Path) -> None:
    taken = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            taken.append(1)
            yield b" " * 512

    async with running_app(Settings(store=str(shared_store), max_body_bytes=1024)) as client:
        response = await client.post("/v1/predict", content=endless(), headers=JSON)
    assert response.status_code == 413
    assert len(taken) == 3


@pytest.mark.parametrize("declared", ["-1", "1e3", "", "9" * 30])
async def test_a_content_length_that_is_no_number_is_refused(
    client: httpx.AsyncClient, declared: str
) -> None:
    response = await client.post("/v1/predict", content=SMALL, headers=JSON | {"content-length": declared})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


async def test_a_body_that_does_not_arrive_is_given_up(shared_store: Path) -> None:
    never = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield SMALL[:10]
        await never.wait()

    settings = Settings(store=str(shared_store), body_timeout_seconds=0.05)
    async with running_app(settings) as client:
        response = await client.post("/v1/predict", content=stalled(), headers=JSON)
    assert (response.status_code, response.json()["code"]) == (408, "body_timeout")


async def test_predictions_beyond_the_limit_are_refused_and_everything_else_answers(
    shared_store: Path,
) -> None:
    arrived, rest = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield SMALL[:10]
        arrived.set()
        await rest.wait()
        yield SMALL[10:]

    async with running_app(Settings(store=str(shared_store), max_in_flight=1)) as client:
        first = asyncio.create_task(client.post("/v1/predict", content=slow(), headers=JSON))
        await arrived.wait()
        refused = await client.post("/v1/predict", json=body())
        alive = await client.get("/livez")
        in_flight = (await client.get("/metrics")).text
        rest.set()
        finished = await first
        again = await client.post("/v1/predict", json=body())
    assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert alive.status_code == 200
    assert "specmoe_predictions_in_flight 1.0" in in_flight
    assert (finished.status_code, again.status_code) == (200, 200)


def sample(text: str, name: str, **labels: str) -> float:
    """The value of one line of /metrics; 0 where there is none."""
    wanted = {f'{label}="{value}"' for label, value in labels.items()}
    for line in text.splitlines():
        metric, _, value = line.rpartition(" ")
        found, _, rest = metric.partition("{")
        if found == name and wanted <= set(rest.rstrip("}").split(",")):
            return float(value)
    return 0.0


async def test_predictions_are_timed_by_model_and_version(client: httpx.AsyncClient) -> None:
    for selector in (1, 1, None):
        await predict(client, version=selector)
    text = (await client.get("/metrics")).text
    for histogram in ("specmoe_request_seconds_count", "specmoe_model_seconds_count"):
        assert sample(text, histogram, model="toy", version="1") == 2
        assert sample(text, histogram, model="toy", version="2") == 1
    assert sample(text, "specmoe_request_seconds_bucket", le="5e-05", model="toy", version="1") >= 0
    assert 'le="5e-05"' in text


async def test_requests_are_counted_by_outcome(client: httpx.AsyncClient) -> None:
    await predict(client)
    await client.post("/v1/predict", json=body(top_n=0))
    await client.post("/v1/predict", content=b"")
    await client.get("/v1/models/toy/versions")
    text = (await client.get("/metrics")).text
    for endpoint, outcome in (
        ("/v1/predict", "ok"),
        ("/v1/predict", "invalid_request"),
        ("/v1/predict", "unsupported_media_type"),
        ("/v1/models/{model}/versions", "ok"),
    ):
        assert sample(text, "specmoe_requests_total", endpoint=endpoint, outcome=outcome) == 1


async def test_no_word_of_a_request_becomes_a_label(client: httpx.AsyncClient) -> None:
    await client.post("/v1/predict", json=body(version="unheard-of") | {"model": "unheard-of"})
    await client.post("/v1/predict", json=body(version="unheard-of"))
    await client.get("/unheard-of", headers={"x-request-id": "unheard-of"})
    await client.get("/v1/models/unheard-of/versions")
    await client.request("UNHEARDOF", "/livez")
    assert "unheard" not in (await client.get("/metrics")).text.lower()


async def test_two_apps_in_a_process_count_apart(shared_store: Path) -> None:
    settings = Settings(store=str(shared_store))
    async with running_app(settings) as one, running_app(settings) as other:
        await predict(one)
        text = (await other.get("/metrics")).text
    assert sample(text, "specmoe_request_seconds_count", model="toy", version="2") == 0


async def test_the_access_log_tells_of_a_request_but_not_of_its_routing(
    shared_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = Settings(store=str(shared_store), access_log_share=1.0)
    async with running_app(settings) as client:
        await predict(client, {"token_id": 31337, "context": [{"token_id": 31338, "experts": FINISHED}]})
    (record,) = [
        r for r in caplog.records if r.getMessage() == "request" and r.__dict__["path"] == "/v1/predict"
    ]
    assert (record.__dict__["status"], record.__dict__["outcome"], record.__dict__["version"]) == (
        200,
        "ok",
        "2",
    )
    assert "3133" not in str([vars(record) for record in caplog.records])


async def test_requests_are_not_logged_unless_asked_for(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await predict(client)
    assert not [record for record in caplog.records if record.name.startswith("service")]
