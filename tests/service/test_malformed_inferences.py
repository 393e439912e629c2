"""Every inference that is refused, and what its sender is told. Whatever is posted, it is never a fault.

.venv/bin/python -m pytest tests/service/test_malformed_inferences.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from model_store.manifest import PREDICT
from model_store.store import open_store
from service.settings import Settings
from tests.service.in_process import Post, app_on_a_thread, running_app
from tests.service.inferring import HEADER, PATH, as_bytes, as_json, binary_body, made_up
from tests.toy_version import toy_version

ARRAYS = made_up(2)
EXPERTS = ARRAYS["experts"]
TENSOR = as_json("experts", EXPERTS)
TOKENS = as_json("token_id", ARRAYS["token_id"])
GATES = as_json("gates", ARRAYS["gates"])
HUGE = 2**62

# inputs -> what the message begins with.
MALFORMED: dict[str, tuple[list[Any], str]] = {
    "no inputs": ([], "inputs has no experts."),
    "no experts": ([TOKENS], "inputs has no experts."),
    "no name": ([TENSOR | {"name": None}], "inputs[0].name is null, expected a valid string."),
    "an input a number": ([3], "inputs[0] is 3, expected an object."),
    "unknown input": ([TENSOR, TOKENS | {"name": "tokens"}], "inputs has 'tokens', expected each of"),
    "input twice": ([TENSOR, TENSOR], "inputs has 'experts' twice, expected each of"),
    "wrong datatype": (
        [TENSOR | {"datatype": "INT64"}],
        "experts is INT64 [2, 4, 2], expected INT32 [2, 4, 2].",
    ),
    "datatype of numpy": ([TENSOR | {"datatype": "int32"}], "experts is int32 [2, 4, 2], expected INT32"),
    "no datatype": ([{"name": "experts", "shape": [2, 4, 2], "data": []}], "inputs[0].datatype is missing."),
    "wrong shape": ([TENSOR | {"shape": [2, 2, 4]}], "experts is INT32 [2, 2, 4], expected INT32 [2, 4, 2]."),
    "no shape": ([TENSOR | {"shape": []}], "experts has the shape [], expected [batch, layers, top_k]"),
    "empty batch": ([TENSOR | {"shape": [0, 4, 2], "data": []}], "experts has the shape [0, 4, 2], expected"),
    "shape negative": ([TENSOR | {"shape": [-1, 4, 2]}], "inputs[0].shape[0] is -1, expected greater than"),
    "shape huge": ([TENSOR | {"shape": [2, HUGE, 2]}], f"experts is INT32 [2, {HUGE}, 2], expected INT32"),
    "shape beyond 64 bits": ([TENSOR | {"shape": [2**64]}], "inputs[0].shape[0] is 18446744073709551616,"),
    "two batch sizes": (
        [TENSOR, TOKENS | {"shape": [3], "data": [1, 2, 3]}],
        "token_id is INT64 [3], expected INT64 [2].",
    ),
    "too few numbers": ([TENSOR | {"data": [0, 1]}], "experts has data that is not of its shape [2, 4, 2]"),
    "no numbers": ([TENSOR | {"data": []}], "experts has data that is not of its shape"),
    "ragged data": ([TENSOR | {"data": [[0] * 8, [0] * 7 + [[1]]]}], "experts has data that is not of its"),
    "nested otherwise": ([TENSOR | {"data": [[0] * 8] * 2}], "experts has data that is not of its shape"),
    "nested too deep": ([TOKENS | {"data": [[1], [2]]}, TENSOR], "token_id has a list of 1 in its data"),
    "no data": ([TENSOR | {"data": None}], "experts has neither data nor binary_data_size, expected one"),
    "data an object": ([TENSOR | {"data": {}}], "inputs[0].data is an object, expected a valid"),
    "a number as text": ([TENSOR | {"data": ["1"] * 16}], "experts has '1' in its data, expected a whole"),
    "a fraction": ([TENSOR | {"data": [1.5] * 16}], "experts has 1.5 in its data, expected a whole number."),
    "true": ([TENSOR | {"data": [0] * 15 + [True]}], "experts has true in its data, expected a whole"),
    "null": ([GATES | {"data": [None] * 16}, TENSOR], "gates has null in its data, expected a number."),
    "beyond int32": ([TENSOR | {"data": [2**31] * 16}], "experts has 2147483648 in its data, expected"),
    "beyond int64": ([TENSOR | {"data": [10**400] * 16}], "experts has 1000"),
    "beyond any float": ([GATES | {"data": [10**400] * 16}, TENSOR], "gates has 1000"),
    "beyond float32": ([TENSOR, GATES | {"data": [1e39] * 16}], "gates[0, 0, 0] is inf, expected a finite"),
    "gates negative": ([TENSOR, GATES | {"data": [-1] * 16}], "gates[0, 0, 0] is -1.0, expected a finite"),
    "expert beyond the last": ([TENSOR | {"data": [8] * 16}], "experts[0, 0, 0] is 8, expected -1 to 7."),
    "a layer half seen": (
        [TENSOR | {"data": [0, -1] * 8}],
        "experts[0, 0] is [0, -1]: seen in some of its slots only.",
    ),
    "token id negative": ([TENSOR, TOKENS | {"data": [1, -2]}], "token_id[1] is -2, expected -1 to"),
    "token id huge": ([TENSOR, TOKENS | {"data": [HUGE, 0]}], f"token_id[0] is {HUGE}, expected -1 to"),
    "half a state": (
        [TENSOR, as_json("last_token", ARRAYS["last_token"])],
        "inputs has some of the state, but not average.",
    ),
    "state not finite": (
        [TENSOR, as_json("last_token", ARRAYS["last_token"]),
         as_json("average", ARRAYS["average"], data=[float("nan")] * 64)],
        "The state is none that this version's advance returns",
    ),
    "bytes that do not follow": (
        [as_bytes("experts", EXPERTS)],
        "The inputs' binary_data_size are 64 bytes together, but 0 follow the JSON.",
    ),
    "bytes huge": (
        [as_bytes("experts", EXPERTS, parameters={"binary_data_size": HUGE})],
        f"The inputs' binary_data_size are {HUGE} bytes together, but 0 follow the JSON.",
    ),
    "bytes negative": (
        [TENSOR | {"parameters": {"binary_data_size": -1}}],
        "inputs[0].parameters.binary_data_size is -1, expected greater",
    ),
    "shared memory": (
        [as_bytes("experts", EXPERTS, parameters={"shared_memory_region": "mine"})],
        "inputs[0].parameters is an object, expected free of extensions that /v2 does not list: shared",
    ),
}  # fmt: skip


def problem(response: httpx.Response) -> dict[str, Any]:
    """The body of a refusal, whose error tells what clients of the protocol show."""
    body: dict[str, Any] = response.json()
    assert set(body) == {"code", "message", "remedy", "request_id", "error"}
    assert body["error"] == f"{body['message']} {body['remedy']}"
    return body


@pytest.mark.anyio
@pytest.mark.parametrize(("inputs", "message"), MALFORMED.values(), ids=MALFORMED)
async def test_a_wrong_input_is_named(client: httpx.AsyncClient, inputs: list[Any], message: str) -> None:
    response = await client.post(PATH, content=json.dumps({"inputs": inputs}))
    body = problem(response)
    assert (response.status_code, body["code"]) == (422, "invalid_request")
    assert body["message"].startswith(message)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 17}, "id is 17, expected a valid string."),
        ({"outputs": [{"name": "logits"}]}, "outputs[0].name is 'logits', expected 'probabilities'."),
        ({"outputs": [{"name": "probabilities"}] * 2}, "outputs is a list of 2, expected"),
        ({"parameters": {"binary_data_output": "yes"}}, "parameters.binary_data_output is 'yes', expected"),
        ({"parameters": {"sequence_id": 3}}, "parameters is an object, expected free of extensions"),
    ],
)
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], message: str
) -> None:
    response = await client.post(PATH, json={"inputs": [TENSOR], **fields})
    assert response.status_code == 422
    assert problem(response)["message"].startswith(message)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/models/other/infer", 404, "model_not_found"),
        ("/v2/models/toy/versions/9/infer", 404, "version_not_found"),
        ("/v2/models/toy/versions/candidate/infer", 404, "version_not_found"),
        ("/v2/models/toy/versions/0/infer", 422, "invalid_request"),
        ("/v2/models/toy/versions/Production/infer", 422, "invalid_request"),
        ("/v2/models/toy/versions/9999999999/infer", 422, "invalid_request"),
        ("/v2/models/toy", 405, "method_not_allowed"),
        ("/v2/models", 404, "not_found"),
    ],
)
async def test_a_wrong_path_is_refused(client: httpx.AsyncClient, path: str, status: int, code: str) -> None:
    response = await client.post(path, json={"inputs": [TENSOR]})
    assert (response.status_code, problem(response)["code"]) == (status, code)


@pytest.mark.anyio
async def test_a_batch_is_limited_whatever_else_it_declares(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={"inputs": [TENSOR | {"shape": [257, HUGE]}]})
    assert (response.status_code, problem(response)["code"]) == (413, "batch_too_large")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("100000", "Inference-Header-Content-Length is 100000, but the body has"),
        ("0", "The body is not JSON"),
        ("20", "The body is not JSON"),
        ("-1", "Inference-Header-Content-Length is '-1', expected a number of bytes."),
        ("1e3", "Inference-Header-Content-Length is '1e3', expected"),
        ("", "Inference-Header-Content-Length is '', expected"),
        ("9" * 30, "Inference-Header-Content-Length is '999"),
    ],
)
async def test_a_header_that_lies_is_refused(client: httpx.AsyncClient, declared: str, message: str) -> None:
    body, _ = binary_body(ARRAYS)
    response = await client.post(PATH, content=body, headers={HEADER: declared})
    assert response.status_code == 422
    assert problem(response)["message"].startswith(message)


@pytest.mark.anyio
async def test_bytes_without_the_header_are_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, content=binary_body(ARRAYS)[0])
    assert response.status_code == 422
    assert problem(response)["message"].startswith("The body is not JSON")


@pytest.mark.anyio
@pytest.mark.parametrize("change", [-1, 1, -16], ids=["a byte less", "a byte more", "truncated"])
async def test_bytes_that_do_not_add_up_are_refused(client: httpx.AsyncClient, change: int) -> None:
    body, headers = binary_body(ARRAYS)
    sent = body[:change] if change < 0 else body + b"\0"
    response = await client.post(PATH, content=sent, headers=headers)
    assert response.status_code == 422
    total = sum(array.nbytes for array in ARRAYS.values())
    assert problem(response)["message"] == (
        f"The inputs' binary_data_size are {total} bytes together, but {total + change} follow the JSON."
    )


@pytest.mark.anyio
async def test_an_input_of_other_bytes_than_its_shape_has_is_refused(client: httpx.AsyncClient) -> None:
    text = json.dumps(
        {"inputs": [as_bytes("experts", EXPERTS, parameters={"binary_data_size": 60})]}
    ).encode()
    headers = {HEADER: str(len(text))}
    response = await client.post(PATH, content=text + bytes(60), headers=headers)
    assert response.status_code == 422
    assert problem(response)["message"] == (
        "experts has a binary_data_size of 60, expected 64: INT32 [2, 4, 2]."
    )


@pytest.mark.anyio
async def test_an_input_in_json_and_in_bytes_is_refused(client: httpx.AsyncClient) -> None:
    text = json.dumps({"inputs": [TENSOR | {"parameters": {"binary_data_size": EXPERTS.nbytes}}]}).encode()
    headers = {HEADER: str(len(text))}
    response = await client.post(PATH, content=text + EXPERTS.tobytes(), headers=headers)
    assert problem(response)["message"].startswith("experts has both data and binary_data_size, expected one")


@pytest.mark.anyio
async def test_a_compressed_body_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, content=b"", headers={"content-encoding": "gzip"})
    assert (response.status_code, problem(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.anyio
async def test_many_wrong_inputs_are_complained_about_once(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, content=b'{"inputs": [' + b"1," * 200_000 + b"1]}")
    assert problem(response)["message"] == "inputs[0] is 1, expected an object."


def with_lookup(predict: bytes) -> bytes:
    """The toy's predict, which looks the last token up in a table of 4096 zeros besides."""
    model = onnx.load_from_string(predict)
    *before, sigmoid = model.graph.node
    lookup = [
        helper.make_node("Gather", ["table", "last_token"], ["found"]),
        helper.make_node("Unsqueeze", ["found", "last"], ["found_wide"]),
        helper.make_node("Add", ["logits", "found_wide"], ["more_logits"]),
        helper.make_node("Sigmoid", ["more_logits"], sigmoid.output),
    ]
    del model.graph.node[:]
    model.graph.node.extend([*before, *lookup])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4096, np.float32), "table"))
    return bytes(model.SerializeToString())


@pytest.mark.anyio
async def test_a_state_that_would_be_looked_up_beyond_a_table_is_refused(tmp_path: Path) -> None:
    draft, graphs = toy_version()
    open_store(tmp_path).publish(draft, graphs | {PREDICT: with_lookup(graphs[PREDICT])})
    inside, beyond = (ARRAYS | {"last_token": np.full((2, 1), token, np.int32)} for token in (7, 4096))
    async with running_app(Settings(store=str(tmp_path), provider="cpu")) as client:
        for arrays, status in ((inside, 200), (beyond, 422), (inside, 200)):
            body, headers = binary_body(arrays)
            response = await client.post(PATH, content=body, headers=headers)
            assert response.status_code == status, response.text
            if status == 422:
                assert problem(response)["message"].startswith(
                    "The state is none that this version's advance"
                )


@pytest.fixture(scope="module")
def post(shared_store: Path) -> Iterator[Post]:
    with app_on_a_thread(Settings(store=str(shared_store), provider="cpu")) as post:
        yield post


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 413, 422), response.text
    if response.status_code != 200:
        problem(response)


sizes = st.integers(-1, 70) | st.sampled_from([HUGE, 2**63 - 1, 2**64])
values = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=3)
data = st.recursive(values, lambda inner: st.lists(inner, max_size=8), max_leaves=20)
input_fields = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*ARRAYS, "other"]) | st.text(max_size=3),
        "shape": st.lists(sizes, max_size=4),
        "datatype": st.sampled_from(["INT32", "INT64", "UINT8", "FP32", "BYTES"]),
        "data": data,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": sizes}),
    },
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    """A request that is right, then changed: fields, numbers, length, what the header says."""
    arrays = made_up(draw(st.integers(1, 6)), seed=draw(st.integers(0, 9)))
    kept = {name: array for name, array in arrays.items() if draw(st.integers(0, 9))}
    inputs = [
        as_bytes(name, array) | (draw(input_fields) if not draw(st.integers(0, 9)) else {})
        for name, array in kept.items()
    ]
    text = json.dumps({"inputs": inputs}).encode()
    numbers = bytearray(b"".join(array.tobytes() for array in kept.values()))
    for _ in range(draw(st.integers(0, 4)) if numbers else 0):
        numbers[draw(st.integers(0, len(numbers) - 1))] = draw(st.integers(0, 255))
    body = text + bytes(numbers)
    cut = draw(st.just(len(body)) | st.integers(0, len(body)))
    declared = draw(st.just(len(text)) | st.integers(0, len(body) + 9))
    return body[:cut], {HEADER: str(declared)}


@settings(max_examples=300, deadline=None)
@given(bodies())
def test_binary_requests_that_are_nearly_right(post: Post, request_: tuple[bytes, dict[str, str]]) -> None:
    check(post(PATH, *request_))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 250))
def test_bytes_of_any_kind(post: Post, body: bytes, declared: int) -> None:
    check(post(PATH, body, {HEADER: str(declared)}))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(input_fields, max_size=3),
    st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), data),
)
def test_json_that_is_nearly_right(post: Post, inputs: list[Any], fields: dict[str, Any]) -> None:
    check(post(PATH, json.dumps({"inputs": [TENSOR, *inputs], **fields}).encode(), {}))
