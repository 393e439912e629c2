"""Every request that is refused, and what its sender is told.

.venv/bin/python -m pytest tests/service/test_malformed_requests.py
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from service.settings import Settings
from tests.service.in_process import FINISHED, body, running_app

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
SEQUENCE = "sequences[0]"

MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"sequences": [{}]}, "model is missing."),
    "model null": (body() | {"model": None}, "model is null, expected a valid string."),
    "model too long": (body() | {"model": "m" * 101}, "model is 'mmm"),
    "no sequences": ({"model": "toy"}, "sequences is missing."),
    "sequences empty": (
        {"model": "toy", "sequences": []},
        "sequences is a list of 0, expected list should have at least 1 item",
    ),
    "sequences an object": ({"model": "toy", "sequences": {}}, "sequences is an object, expected a valid"),
    "sequence a number": (body(3), f"{SEQUENCE} is 3, expected an object."),  # type: ignore[arg-type]
    "unknown option": (body(topn=3), "topn is not a field of this request."),
    "unknown field of a token": (body({"tokens": [1]}), f"{SEQUENCE}.tokens is not a field of this request."),
    "context in a context": (
        body({"context": [{"experts": FINISHED, "context": []}]}),
        f"{SEQUENCE}.context[0].context is not a field of this request.",
    ),
    "version zero": (body(version=0), "version is 0, expected a version number from 1 up"),
    "version true": (body(version=True), "version is true, expected a version number"),
    "version huge": (body(version=2**40), "version is 1099511627776, expected a version number"),
    "version a float": (body(version=1.0), "version is 1.0, expected a version number"),
    "version a path": (body(version="../2"), "version is '../2', expected a version number"),
    "version in upper case": (
        body(version="Production"),
        "version is 'Production', expected a version number",
    ),
    "token id text": (body({"token_id": "5"}), f"{SEQUENCE}.token_id is '5', expected a valid integer"),
    "token id negative": (body({"token_id": -1}), f"{SEQUENCE}.token_id is -1, expected greater than"),
    "token id huge": (body({"token_id": 2**31}), f"{SEQUENCE}.token_id is 2147483648, expected less than"),
    "token id a float": (body({"token_id": 1.5}), f"{SEQUENCE}.token_id is 1.5, expected a valid integer"),
    "expert negative": (
        body({"experts": [[0, -1]]}),
        f"{SEQUENCE}.experts[0][1] is -1, expected greater than",
    ),
    "expert beyond the last": (
        body({"experts": [[0, 8]]}),
        f"{SEQUENCE}.experts[0][1] is 8, expected 0 to 7.",
    ),
    "expert beyond any model": (
        body({"experts": [[0, 9999]]}),
        f"{SEQUENCE}.experts[0][1] is 9999, expected",
    ),
    "expert true": (body({"experts": [[0, True]]}), f"{SEQUENCE}.experts[0][1] is true, expected a valid"),
    "expert in a later context": (
        body({}, {"context": [{"experts": FINISHED}, {"experts": [*FINISHED[:3], [1, 9]]}]}),
        "sequences[1].context[1].experts[3][1] is 9, expected 0 to 7.",
    ),
    "too few slots": (
        body({"experts": [[0, 1], [2]]}),
        f"{SEQUENCE}.experts[1] has 1 entries, expected top_k = 2.",
    ),
    "too many slots": (
        body({"experts": [[0, 1, 2]]}),
        f"{SEQUENCE}.experts[0] has 3 entries, expected top_k = 2.",
    ),
    "slots of one": (body({"experts": [[3]]}), f"{SEQUENCE}.experts[0] has 1 entries, expected top_k = 2."),
    "no slots": (body({"experts": [[]]}), f"{SEQUENCE}.experts[0] has 0 entries, expected top_k = 2."),
    "expert twice": (body({"experts": [[4, 4]]}), f"{SEQUENCE}.experts[0] is [4, 4]: not all different."),
    "experts flat": (body({"experts": [0, 1]}), f"{SEQUENCE}.experts[0] is 0, expected a valid"),
    "token finished": (
        body({"experts": FINISHED}),
        f"{SEQUENCE}.experts has 4 layers, expected at most 3 of 4",
    ),
    "context unfinished": (
        body({"context": [{"experts": FINISHED[:3]}]}),
        f"{SEQUENCE}.context[0].experts has 3 layers, expected 4: a finished token has them all.",
    ),
    "context empty token": (
        body({"context": [{}]}),
        f"{SEQUENCE}.context[0].experts has 0 layers, expected 4",
    ),
    "gates without experts": (
        body({"gates": [[1, 1]]}),
        f"{SEQUENCE}.gates has 1 layers, its experts have 0.",
    ),
    "gates of fewer layers": (
        body({"experts": FINISHED[:2], "gates": [[1, 1]]}),
        f"{SEQUENCE}.gates has 1 layers, its experts have 2.",
    ),
    "gates of fewer slots": (
        body({"experts": [[0, 1]], "gates": [[1]]}),
        f"{SEQUENCE}.gates[0] has 1 entries, expected top_k = 2.",
    ),
    "gates all zero": (
        body({"experts": [[0, 1]], "gates": [[0, 0]]}),
        f"{SEQUENCE}.gates[0] adds up to 0, expected more.",
    ),
    "gates vanish in float32": (
        body({"experts": [[0, 1]], "gates": [[1e-60, 1e-60]]}),
        f"{SEQUENCE}.gates[0] adds up to 0, expected more.",
    ),
    "gate negative": (
        body({"experts": [[0, 1]], "gates": [[1, -0.5]]}),
        f"{SEQUENCE}.gates[0][1] is -0.5, expected greater than",
    ),
    "gate beyond float32": (
        body({"experts": [[0, 1]], "gates": [[1, 1e39]]}),
        f"{SEQUENCE}.gates[0][1] is 1e+39, expected less than",
    ),
    "gate null": (
        body({"experts": [[0, 1]], "gates": [[1, None]]}),
        f"{SEQUENCE}.gates[0][1] is null, expected a valid number.",
    ),
    "layer beyond the last": (body(layers=[4]), "layers[0] is 4, expected 0 to 3"),
    "layer negative": (body(layers=[-1]), "layers[0] is -1, expected greater than"),
    "layer seen by all": (body({"experts": FINISHED[:2]}, layers=[2, 1]), "layers[1] is 1, expected 2 to 3"),
    "layers empty": (body(layers=[]), "layers is a list of 0, expected list should have at least 1 item"),
    "top_n zero": (body(top_n=0), "top_n is 0, expected greater than"),
    "top_n beyond the experts": (body(top_n=9), "top_n is 9, but toy has 8 experts a layer."),
    "coverage zero": (body(coverage=0), "coverage is 0, expected greater than 0"),
    "coverage one": (body(coverage=1), "coverage is 1, expected less than 1"),
    "coverage in percent": (body(coverage=95), "coverage is 95, expected less than 1"),
    "coverage above the table": (
        body(coverage=0.999),
        "Coverage 0.999 was asked for, expected above 0 and at most 0.99",
    ),
    "top_n and coverage": (
        body(top_n=4, coverage=0.9),
        "top_n and coverage came together, expected one of them.",
    ),
    "combine unknown": (body(combine="both"), "combine is 'both', expected 'per_sequence' or 'union'."),
}

NOT_JSON = {
    "nothing": b"",
    "cut off": b'{"model": "toy", "sequences": [{}',
    "not a number": b'{"model": "toy", "sequences": [{"experts": [[0, 1]], "gates": [[NaN, 1]]}]}',
    "infinite": b'{"model": "toy", "sequences": [{"experts": [[0, 1]], "gates": [[1, Infinity]]}]}',
    "infinite as a number": b'{"model": "toy", "sequences": [{"experts": [[0, 1]], "gates": [[1, 1e999]]}]}',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "half a character": b'{"model": "\\ud83d", "sequences": [{}]}',
    "another encoding": '{"model": "toy"}'.encode("utf-16"),
    "nested without end": b"[" * 5000,
    "a list": b"[]",
    "a number with 5000 digits": b'{"model": "toy", "sequences": [{"token_id": ' + b"9" * 5000 + b"}]}",
}


@pytest.mark.parametrize(("request_body", "message"), MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_request_is_told_field_and_expectation(
    client: httpx.AsyncClient, request_body: dict[str, Any], message: str
) -> None:
    response = await client.post("/v1/predict", json=request_body)
    error = response.json()
    assert (response.status_code, error["code"]) == (422, "invalid_request")
    assert error["message"].startswith(message), error["message"]
    assert error["remedy"]
    assert error["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON.keys())
async def test_a_body_that_is_not_json_of_finite_numbers_is_refused(
    client: httpx.AsyncClient, content: bytes
) -> None:
    response = await client.post("/v1/predict", content=content, headers=JSON)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


async def test_what_came_is_shown_shortened(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/predict", json=body(combine="x" * 10_000))
    assert len(response.content) < 500


async def test_further_problems_are_counted(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/predict", json=body(top_n=0, combine="x", version=0))
    assert response.json()["message"].endswith("(2 more problems.)")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        JSON | {"content-encoding": "gzip"},
    ],
    ids=["none", "text", "form", "compressed"],
)
async def test_a_body_that_does_not_claim_to_be_json_is_refused(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    response = await client.post("/v1/predict", content=b"{}", headers=headers)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


async def test_json_with_its_charset_named_is_taken(client: httpx.AsyncClient) -> None:
    content = b'{"model": "toy", "sequences": [{}]}'
    response = await client.post(
        "/v1/predict", content=content, headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("request_body", "code", "message"),
    [
        (
            body() | {"model": "other"},
            "model_not_found",
            "This service does not serve that model. It serves: toy.",
        ),
        (body(version=3), "version_not_found", "toy has no version 3."),
        (body(version="candidate"), "version_not_found", "toy has no alias 'candidate'."),
    ],
    ids=["model", "version", "alias"],
)
async def test_what_is_not_there_is_404(
    client: httpx.AsyncClient, request_body: dict[str, Any], code: str, message: str
) -> None:
    response = await client.post("/v1/predict", json=request_body)
    assert (response.status_code, response.json()["code"]) == (404, code)
    assert response.json()["message"].startswith(message)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([{}] * 4, "sequences has 4 entries, at most 3 are allowed."),
        (
            [{"context": [{"experts": FINISHED}] * 3}] * 2,
            "The contexts have 6 tokens in all, at most 5 are allowed.",
        ),
    ],
    ids=["sequences", "context"],
)
async def test_more_work_than_allowed_is_413(shared_store: str, sequences: list[Any], message: str) -> None:
    settings = Settings(store=str(shared_store), max_sequences=3, max_context_tokens=5)
    async with running_app(settings) as client:
        response = await client.post("/v1/predict", json=body(*sequences))
    assert (response.status_code, response.json()["code"]) == (413, "batch_too_large")
    assert response.json()["message"] == message


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/predict/", 404, "not_found"),
        ("GET", "/v1/predict", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other/versions", 404, "model_not_found"),
        ("GET", "/v1/models/..%2F..%2Fetc/versions", 404, "not_found"),
        ("GET", "/v1/models/toy/versions?limit=0", 422, "invalid_request"),
        ("GET", "/v1/models/toy/versions?limit=many", 422, "invalid_request"),
    ],
)
async def test_wrong_paths_and_methods_have_the_same_error_body(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert set(response.json()) == {"code", "message", "remedy", "request_id"}
