"""The table from domain errors to HTTP, and the body that every error has.

.venv/bin/python -m pytest tests/service/test_problems.py
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import httpx
import orjson
import pytest

import model_store
import service
import speculation
import traces
from service.app import create_app
from service.problems import KINDS, problem
from service.settings import Settings
from traces.errors import SpecMoEError


def subclasses(error: type[SpecMoEError]) -> Iterator[type[SpecMoEError]]:
    yield error
    for below in error.__subclasses__():
        yield from subclasses(below)


def errors_the_service_can_see() -> set[type[SpecMoEError]]:
    """Of every module of the rooms that the service may import, itself included."""
    for room in (model_store, service, speculation):
        for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
            importlib.import_module(module.name)
    for leaf in ("errors", "spec"):
        importlib.import_module(f"{traces.__name__}.{leaf}")
    rooms = ("model_store.", "service.", "speculation.", "traces.errors", "traces.spec")
    return {error for error in subclasses(SpecMoEError) if f"{error.__module__}.".startswith(rooms)}


def test_the_table_names_every_error_the_service_can_see_and_no_other() -> None:
    assert set(KINDS) == errors_the_service_can_see()


def test_a_code_has_one_status() -> None:
    statuses = {(kind.code, kind.status) for kind in KINDS.values()}
    assert len(statuses) == len({code for code, _ in statuses})


@pytest.mark.parametrize("error", KINDS, ids=lambda error: error.__name__)
def test_every_domain_error_becomes_a_body_of_message_and_remedy(error: type[SpecMoEError]) -> None:
    response = problem(error("It came.", remedy="Mend it.")).response("id")
    assert orjson.loads(response.body) == {
        "code": KINDS[error].code,
        "message": "It came.",
        "remedy": "Mend it.",
        "request_id": "id",
    }


@pytest.mark.parametrize("error", KINDS, ids=lambda error: error.__name__)
def test_who_meets_a_busy_or_starting_service_is_told_when_to_come_back(error: type[SpecMoEError]) -> None:
    found = problem(error("It came.", remedy="Mend it."))
    assert ("Retry-After" in found.headers) == (found.kind.status in (429, 503))


def test_an_unexpected_error_tells_nothing_of_itself() -> None:
    body = problem(ValueError("secret")).response("id").body
    assert b"secret" not in body


@pytest.mark.anyio
async def test_a_fault_is_500_with_the_request_id_and_stands_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = create_app(Settings())

    @app.get("/fault")
    async def fault() -> None:
        raise ZeroDivisionError("secret")

    transport = httpx.ASGITransport(app)  # an exception that got past the middleware would be raised here
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        response = await client.get("/fault", headers={"x-request-id": "mine"})
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert response.json()["request_id"] == "mine"
    assert "secret" not in response.text
    (record,) = [record for record in caplog.records if record.name == "service.middleware"]
    assert (record.__dict__["request_id"], record.exc_info[0]) == ("mine", ZeroDivisionError)  # type: ignore[index]
