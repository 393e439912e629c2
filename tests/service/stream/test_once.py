"""A body of frames is answered with what a stream would be told.

.venv/bin/python -m pytest tests/service/stream/test_once.py
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.stream.conversing import Service, conversing
from tests.service.stream.frames import Message, binary, frame, read

pytestmark = pytest.mark.anyio

FRAMES = {"content-type": "application/octet-stream"}
HELLO = {"type": "hello", "model": "toy", "union": True}
OPEN = {"type": "open", "sequences": [1, 2]}
CONTEXT = {"type": "context", "sequence": 1, "experts": [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 3}
START = {"type": "start", "tag": 5, "sequences": [1, 2], "token_ids": [7, 976]}
ROUTING = {"type": "routing", "tag": 6, "sequences": [2], "first_layer": 0, "experts": [[[0, 1], [2, 3]]]}


@pytest.fixture
async def service(shared_store: Path) -> AsyncIterator[Service]:
    async with conversing(shared_store) as service:
        yield service


def behind_length(*messages: Message | bytes) -> bytes:
    frames = [message if isinstance(message, bytes) else binary(message) for message in messages]
    return b"".join(struct.pack("<I", len(message)) + message for message in frames)


def parted(body: bytes) -> list[bytes]:
    frames = []
    while body:
        (length,) = struct.unpack_from("<I", body)
        frames.append(body[4 : 4 + length])
        body = body[4 + length :]
    return frames


async def post(service: Service, body: bytes, **headers: str) -> httpx.Response:
    return await service.client.post("/v1/predict", content=body, headers=FRAMES | headers)


async def test_a_body_of_frames_is_answered_as_a_stream_is(service: Service) -> None:
    talk = await service.talk(**HELLO)
    for message in (OPEN, CONTEXT, START, ROUTING):
        fields = dict(message)
        talk.say(fields.pop("type"), **fields)
    answer = await post(service, behind_length(HELLO, OPEN, CONTEXT, START, ROUTING))
    assert (answer.status_code, answer.headers["content-type"]) == (200, FRAMES["content-type"])
    frames = parted(answer.content)
    told = await talk.settled()
    assert [(f["type"], f["tag"], f["first_layer"]) for f in told] == [
        ("forecast", 6, 2),
        ("union", 6, 2),
        ("forecast", 5, 0),  # its history had to be taken in
        ("union", 5, 0),
    ]
    # To the last bit it is not: another batch may add up in another order.
    assert flat([read(frame) for frame in frames]) == pytest.approx(flat(told), abs=1e-5)


def flat(value: Any) -> list[Any]:
    """Every number and name in it."""
    if isinstance(value, dict):
        return [part for name in sorted(value) for part in flat(value[name])]
    if isinstance(value, list):
        return [part for inner in value for part in flat(inner)]
    return [value]


async def test_nothing_is_kept(service: Service) -> None:
    body = behind_length(HELLO, OPEN, START)
    first, again = await post(service, body), await post(service, body)
    assert first.content == again.content
    assert service.in_use == 0


async def test_a_stream_that_ends_meanwhile_takes_nothing_away(shared_store: Path) -> None:
    past = {"type": "context", "sequence": 1, "experts": CONTEXT["experts"] * 100}
    async with conversing(shared_store, extra_versions=0) as service:
        talk = await service.talk()
        answer = asyncio.create_task(post(service, behind_length(HELLO | {"version": 1}, OPEN, past, START)))
        while not service.in_use:
            await asyncio.sleep(0)
        talk.leave()
        assert [hub.running.version for hub in service.streams.hubs("toy")] == [2, 1]
        assert (await answer).status_code == 200
        assert [hub.running.version for hub in service.streams.hubs("toy")] == [2]


async def test_messages_that_ask_for_nothing_are_answered_with_nothing(service: Service) -> None:
    answer = await post(service, behind_length(HELLO, OPEN))
    assert (answer.status_code, answer.content) == (200, b"")


CASES = {
    "nothing": (b"", 400, "unreadable_message", "The body holds no message."),
    "a length cut short": (b"\x20\x00", 400, "unreadable_message", "The body ends within a length"),
    "a message cut short": (
        behind_length(HELLO)[:-1],
        400,
        "unreadable_message",
        "The message at byte 4 has 35 bytes; 34 are left.",
    ),
    "a length of more than there is": (
        behind_length(HELLO) + b"\xff\xff\xff\xff",
        400,
        "unreadable_message",
        "The message at byte 43 has 4294967295 bytes; 0 are left.",
    ),
    "an empty message": (behind_length(HELLO, b""), 400, "unreadable_message", "A message has 0 bytes"),
    "no hello": (behind_length(OPEN), 400, "unreadable_message", "open came before hello."),
    "hello twice": (behind_length(HELLO, HELLO), 400, "unreadable_message", "hello came twice."),
    "unknown kind": (behind_length(HELLO, frame(9)), 400, "unreadable_message", "kind is 9"),
    "JSON": (b'{"model": "toy"}', 400, "unreadable_message", "The message at byte 4 has"),
    "another model": (behind_length(HELLO | {"model": "other"}), 404, "model_not_found", "This service"),
    "no such version": (behind_length(HELLO | {"version": 9}), 404, "version_not_found", "toy has no"),
    "a wrong option": (behind_length(HELLO | {"top_n": 9}), 422, "invalid_message", "top_n is 9, but"),
    "not open": (behind_length(HELLO, START), 422, "invalid_message", "sequences[0] is 1, which"),
    "refused later": (behind_length(HELLO, OPEN, START, START), 422, "invalid_message", "sequences[0], 1,"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code", "message"), CASES.values(), ids=CASES.keys())
async def test_a_wrong_body_is_refused_in_json(
    service: Service, body: bytes, status: int, code: str, message: str
) -> None:
    answer = await post(service, body)
    error = answer.json()
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["message"].startswith(message), error["message"]
    assert error["remedy"] and error["request_id"] == answer.headers["x-request-id"]
    assert service.in_use == 0


async def test_a_model_that_fails_is_a_fault_of_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.talk()
    (hub,) = service.streams.hubs("toy")
    monkeypatch.setattr(hub.slots, "forecast", lambda rows: 1 / 0)
    answer = await post(service, behind_length(HELLO, OPEN, START))
    assert (answer.status_code, answer.json()["code"], service.in_use) == (500, "internal", 0)


async def test_a_compressed_body_is_refused(service: Service) -> None:
    answer = await post(service, behind_length(HELLO), **{"content-encoding": "gzip"})
    assert answer.status_code == 415


async def test_the_version_that_answered_is_counted(service: Service) -> None:
    await post(service, behind_length(HELLO, OPEN, START))
    labels = 'endpoint="/v1/predict",model="toy",outcome="ok",version="2"'
    assert await service.metric(f"specmoe_requests_total{{{labels}}}") == 1


async def test_openapi_tells_of_bodies_of_frames(service: Service) -> None:
    described = (await service.client.get("/openapi.json")).json()["paths"]["/v1/predict"]["post"]
    assert FRAMES["content-type"] in described["requestBody"]["content"]
    assert FRAMES["content-type"] in described["responses"]["200"]["content"]
