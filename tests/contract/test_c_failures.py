"""What the C client makes of a service that answers wrongly, late or not at all: words, never a crash.

.venv/bin/python -m pytest tests/contract/test_c_failures.py
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.c_client import GONE, OK, Driver, compiled
from tests.contract.raw_server import HEADER, RawServer, Talk, forecast, frame, linger, welcome
from tests.contract.streams import until

BINARY, TEXT, CLOSE, PING, PONG = 2, 1, 8, 9, 10


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("driver.c", tmp_path_factory.mktemp("c"))


@pytest.fixture
def client(program: Path) -> Iterator[Driver]:
    with Driver(program) as driver:
        yield driver


def says(words: bytes, *, then: Callable[[Talk], None] = linger) -> Callable[[Talk], None]:
    """Welcomes, reads open and start, says that."""

    def deed(talk: Talk) -> None:
        talk.greet()
        talk.message()
        talk.message()
        talk.connection.sendall(words)
        then(talk)

    return deed


def started(client: Driver, server: RawServer) -> None:
    """Sequence 0 is at the start of a token."""
    assert client.connect(server.url) == {"code": OK, "error": ""}
    client("open", [0])
    assert client.start([0], [7])["code"] == OK


def hang_up(talk: Talk) -> None:
    """At once."""


def babbles(words: bytes) -> Callable[[Talk], None]:
    """Reads the request, says that, and hangs up: with the request unread, that would be a reset."""

    def deed(talk: Talk) -> None:
        talk.request()
        talk.connection.sendall(words)

    return deed


def answers(code: str, body: bytes = b"", *headers: bytes) -> Callable[[Talk], None]:
    """Plain HTTP instead of an upgrade."""

    def deed(talk: Talk) -> None:
        talk.request()
        lines = [f"HTTP/1.1 {code}".encode(), *headers, b"Content-Length: %d" % len(body)]
        talk.connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        linger(talk)

    return deed


HANDSHAKES: dict[str, tuple[Callable[[Talk], None], str]] = {
    "another path": (
        answers("404 Not Found", b'{"code":"not_found"}'),
        'HTTP/1.1 404 Not Found {"code":"not_found"}',
    ),
    "too busy": (answers("503 Busy"), "The handshake was refused, expected HTTP/1.1 101: HTTP/1.1 503 Busy"),
    "a status that only begins like it": (answers("1010 Odd"), "HTTP/1.1 1010 Odd"),
    "control characters": (answers("403 \x1b[31mNo", b"\x00\xff\x07"), "403 ?[31mNo ???"),
    "no HTTP": (
        babbles(b"220 mail.example ready\r\n"),
        'beginning with "220 mail.example',
    ),
    "nothing": (babbles(b""), "hung up instead of answering the handshake"),
    "an endless header": (
        babbles(b"HTTP/1.1 101 X\r\nA: " + b"b" * 40_000),
        "speaks no HTTP",
    ),
    "cut off in the header": (
        babbles(b"HTTP/1.1 101 X\r\nUpgrade: we"),
        "speaks no HTTP",
    ),
    "half a body": (
        babbles(b"HTTP/1.1 400 No\r\nContent-Length: 999\r\n\r\nbecause"),
        "400 No because",
    ),
    "a wrong proof": (
        lambda talk: talk.upgrade(talk.request(), accept=b"c2VjcmV0"),
        "Sec-WebSocket-Accept is c2VjcmV0",
    ),
    "no proof": (
        answers("101 Switching Protocols", b"", b"Upgrade: websocket"),
        "Sec-WebSocket-Accept is none",
    ),
    "an extension": (
        lambda talk: talk.upgrade(talk.request(), lines=b"Sec-WebSocket-Extensions: permessage-deflate\r\n"),
        "an extension or a subprotocol",
    ),
}


@pytest.mark.parametrize(("deed", "words"), HANDSHAKES.values(), ids=HANDSHAKES.keys())
def test_a_handshake_that_is_refused_says_what_came(
    client: Driver, deed: Callable[[Talk], None], words: str
) -> None:
    with RawServer(deed) as server:
        answer = client.connect(server.url)
    assert answer["code"] == GONE
    assert words in answer["error"]


ERROR = b'{"code":"not_ready","message":"It is so.","remedy":"Wait."}'
WELCOMES: dict[str, tuple[bytes, str]] = {
    "nothing": (frame(BINARY, b""), "0 bytes, expected a header of 16"),
    "a forecast": (frame(BINARY, forecast()), "kind 129 of 36 bytes instead of a welcome"),
    "a short one": (frame(BINARY, welcome()[:-1]), "kind 128 of 39 bytes"),
    "another protocol": (frame(BINARY, welcome(protocol=2)), "protocol 2, expected 1"),
    "no layers": (frame(BINARY, welcome(layers=0)), "without layers"),
    "fewer experts than are routed": (frame(BINARY, welcome(experts=1)), "top 2 of 1 experts"),
    "an error": (frame(BINARY, HEADER.pack(131, 1, 0, 0, 0, 0, len(ERROR)) + ERROR), '"code":"not_ready"'),
    "an error that ends nothing": (
        frame(BINARY, HEADER.pack(131, 0, 0, 0, 0, 0, len(ERROR)) + ERROR),
        "not_ready",
    ),
    "a close": (
        frame(CLOSE, struct.pack(">H", 4429) + b"too many streams"),
        "too many streams (close code 4429",
    ),
    "text and a close": (
        frame(TEXT, b"{}") + frame(CLOSE, struct.pack(">H", 4400) + b"no"),
        "no (close code 4400",
    ),
    "a close without a reason": (frame(CLOSE, b""), "closed the stream without a reason"),
    "a message that is too long": (
        frame(BINARY, bytes(20_000)),
        "20000 bytes or more, expected 16384 at most",
    ),
}


@pytest.mark.parametrize(("words", "reason"), WELCOMES.values(), ids=WELCOMES.keys())
def test_a_welcome_that_is_none_is_no_stream(client: Driver, words: bytes, reason: str) -> None:
    with RawServer(lambda talk: (talk.greet(words), linger(talk))[1]) as server:  # type: ignore[func-returns-value]
        answer = client.connect(server.url)
    assert answer["code"] == GONE
    assert reason in answer["error"]


@pytest.mark.parametrize("silent_after", ["connecting", "the request", "the upgrade"])
def test_a_service_that_says_nothing_is_given_up(client: Driver, silent_after: str) -> None:
    def deed(talk: Talk) -> None:
        if silent_after == "the upgrade":
            talk.upgrade(talk.request())
        elif silent_after == "the request":
            talk.request()
            talk.connection.sendall(b"HTTP/1.1 101 Switching")
        linger(talk)

    with RawServer(deed) as server:
        answer = client.connect(server.url, timeout_ms=100)
    assert answer["code"] == GONE
    assert "within 100 ms" in answer["error"]


ODD: dict[str, tuple[bytes, str]] = {
    "text": (frame(TEXT, b"hello"), "a text message of 5 bytes"),
    "less than a header": (frame(BINARY, b"\x81\x00"), "2 bytes, expected a header"),
    "an unknown kind": (frame(BINARY, HEADER.pack(200, 0, 0, 0, 0, 0, 0)), "kind 200"),
    "a union that nobody asked for": (frame(BINARY, forecast(kind=130)), "kind 130"),
    "a client's kind": (frame(BINARY, HEADER.pack(3, 0, 0, 0, 0, 0, 0)), "kind 3"),
    "welcome again": (frame(BINARY, welcome()), "kind 128"),
    "a forecast of no sequence": (frame(BINARY, forecast(count=0)), "forecast of 0 sequences"),
    "a forecast of too many": (
        frame(BINARY, forecast(count=65)),
        "forecast of 65 sequences, expected 1 to 64",
    ),
    "a forecast of no layer": (frame(BINARY, forecast(layers=0)), "up to layer 0 of 4"),
    "a forecast of a layer that is none": (frame(BINARY, forecast(first=4)), "up to layer 5 of 4"),
    "a forecast after layers that were not told": (
        frame(BINARY, forecast(first=3)),
        "after 3 layers of a token",
    ),
    "half an expert": (frame(BINARY, forecast(body=bytes(9))), "rows of 1 to 4 experts"),
    "no experts": (frame(BINARY, forecast(body=bytes(2))), "rows of 1 to 4 experts"),
    "too many experts": (frame(BINARY, forecast(body=bytes(2 + 5 * 5))), "rows of 1 to 4 experts"),
    "a size beyond its row": (
        frame(BINARY, forecast(body=struct.pack("<fHB", 0.5, 2, 1))),
        "2 experts in rows of 1",
    ),
    "a size beyond its row in the second sequence": (
        frame(BINARY, forecast(count=2, body=struct.pack("<IIffHHBB", 1, 0, 0.5, 0.5, 1, 3, 1, 2))),
        "3 experts in rows of 1",
    ),
    "sizes of one sequence for two": (
        frame(BINARY, forecast(count=2, body=struct.pack("<IIffHBB", 1, 0, 0.5, 0.5, 1, 1, 2))),
        "a forecast in 44 bytes, expected rows of 1 to 4 experts",
    ),
    "an expert that is none": (
        frame(BINARY, forecast(body=struct.pack("<fHB", 0.5, 1, 8))),
        "expert 8 of a model with 8",
    ),
    "a probability above 1": (
        frame(BINARY, forecast(body=struct.pack("<fHB", 1.5, 1, 1))),
        "not within 0 and 1",
    ),
    "a probability that is none": (
        frame(BINARY, forecast(body=struct.pack("<fHB", float("nan"), 1, 1))),
        "not within 0 and 1",
    ),
    "an error with a wrong length": (
        frame(BINARY, HEADER.pack(131, 0, 0, 0, 0, 0, 9) + b"oops"),
        "an error in 4 bytes, expected 9",
    ),
    "expired beyond its end": (
        frame(BINARY, HEADER.pack(133, 0, 3, 0, 0, 0, 0) + bytes(4)),
        "expired in 20 bytes, expected 28",
    ),
    "goodbye with more": (frame(BINARY, HEADER.pack(132, 0, 0, 0, 0, 0, 1) + b"x"), "goodbye has 17 bytes"),
    "a fatal error": (frame(BINARY, HEADER.pack(131, 1, 0, 0, 0, 0, len(ERROR)) + ERROR), "ended the stream"),
    "a masked frame": (b"\x82\x81\x00\x00\x00\x00\x01", "masked"),
    "an extension": (b"\xc2\x01\x00", "extension"),
    "a wrong opcode": (b"\x83\x00", "opcode 3"),
    "a wrong control opcode": (b"\x8b\x00", "opcode 11"),
    "a long ping": (b"\x89\x7e\x00\x7e" + bytes(126), "126 bytes, expected 125 at most"),
    "a ping in fragments": (b"\x09\x00", "in fragments"),
    "nothing to continue": (frame(0, b"x"), "nothing to continue"),
    "a message within a message": (
        frame(BINARY, b"x", final=False) + frame(BINARY, b"y"),
        "within a message in fragments",
    ),
    "an oversize length": (b"\x82\x7f" + b"\xff" * 8, "expected 16384 at most"),
    "a length of 2 GiB": (
        b"\x82\x7f" + struct.pack(">Q", 1 << 31),
        "2147483648 bytes or more, expected 16384",
    ),
    "fragments that are too long together": (
        frame(BINARY, bytes(10_000), final=False) + frame(0, bytes(10_000)),
        "20000 bytes or more",
    ),
    "a close": (frame(CLOSE, struct.pack(">H", 1011) + b"a fault"), "a fault (close code 1011"),
}


@pytest.mark.parametrize(("words", "reason"), ODD.values(), ids=ODD.keys())
def test_what_no_service_says_ends_the_stream_with_the_reason(
    client: Driver, words: bytes, reason: str
) -> None:
    with RawServer(says(words)) as server:
        started(client, server)
        answer = client.wait(0)
        assert answer["code"] == GONE
        assert reason in answer["error"]
        assert client.route([0], [[[0, 1]]]) == answer
        assert client("close", [0]) == client.poll() == client.latest(0) == answer


@pytest.mark.parametrize("count", [0, 1, 2, 5, 30])
def test_a_service_that_is_gone_in_the_middle_of_a_frame_is_told(client: Driver, count: int) -> None:
    with RawServer(says(frame(BINARY, forecast())[:count], then=hang_up)) as server:
        started(client, server)
        answer = client.wait(0)
        assert answer["code"] == GONE
        assert ("in the middle of a frame" in answer["error"]) == (count > 0)
        assert "hung up" in answer["error"]


LATE = {
    "of an earlier token": ("end", forecast(token=1), forecast(token=0, body=struct.pack("<fHB", 1, 1, 1))),
    "of an earlier opening": ("close", forecast(wire=64), forecast(body=struct.pack("<fHB", 1, 1, 1))),
}


@pytest.mark.parametrize(("command", "current", "late"), LATE.values(), ids=LATE.keys())
def test_a_forecast_that_comes_late_is_not_taken_for_a_current_one(
    client: Driver, command: str, current: bytes, late: bytes
) -> None:
    heard: list[tuple[int, bytes]] = []

    def deed(talk: Talk) -> None:
        talk.greet()
        for _ in range(5 if command == "close" else 4):
            talk.message()
        talk.connection.sendall(frame(BINARY, current) + frame(BINARY, late) + frame(PING, b""))
        heard.append(talk.message())
        linger(talk)

    with RawServer(deed) as server:
        started(client, server)
        client(command, [0])
        if command == "close":
            client("open", [0])
        client.start([0])
        assert client.wait(0)["experts"].tolist() == [[5, 3]]
        until(lambda: client.poll()["code"] == OK and heard)
        assert client.latest(0)["experts"].tolist() == [[5, 3]]


def in_pieces(talk: Talk) -> None:
    """A forecast in three fragments, a ping between them, every byte by itself."""
    message = forecast()
    parts = frame(BINARY, message[:7], final=False) + frame(PING, b"are you there")
    for byte in parts + frame(0, message[7:7], final=False) + frame(0, message[7:]):
        talk.connection.sendall(bytes([byte]))


def test_a_message_in_fragments_is_put_together_and_a_ping_answered(client: Driver) -> None:
    heard: list[tuple[int, bytes]] = []

    def deed(talk: Talk) -> None:
        says(b"", then=in_pieces)(talk)
        heard.append(talk.message())
        linger(talk)

    with RawServer(deed) as server:
        started(client, server)
        answer = client.wait(0)
        assert (answer["experts"].tolist(), answer["probabilities"].tolist()) == ([[5, 3]], [[0.75, 0.5]])
        until(lambda: heard)
    assert heard == [(PONG, b"are you there")]


def test_what_comes_together_with_the_handshake_is_not_lost(client: Driver) -> None:
    def deed(talk: Talk) -> None:
        talk.upgrade(talk.request(), frame(BINARY, welcome()))
        linger(talk)

    with RawServer(deed) as server:
        assert client.connect(server.url)["code"] == OK


def test_frames_of_the_client_are_masked_each_anew(client: Driver) -> None:
    """RFC 6455, 5.3; Talk.message refuses what is not masked."""
    heard: list[Any] = []

    def deed(talk: Talk) -> None:
        talk.greet()
        messages = [talk.message() for _ in range(3)]
        heard.append((messages, talk.masks))

    with RawServer(deed) as server:
        started(client, server)
        client.route([0], [[[6, 1]]], [[[0.5, 0.25]]])
        until(lambda: heard)
    ((opened, start, routing), masks) = heard[0]
    assert opened == (BINARY, HEADER.pack(2, 0, 1, 1, 0, 0, 0) + struct.pack("<I", 0))
    assert start == (BINARY, HEADER.pack(4, 1, 1, 2, 0, 0, 0) + struct.pack("<Ii", 0, 7))
    assert routing == (BINARY, HEADER.pack(5, 2, 1, 3, 0, 1, 0) + struct.pack("<IffBB", 0, 0.5, 0.25, 6, 1))
    assert len(set(masks)) == len(masks)


def test_a_wait_is_over_when_its_time_is(client: Driver) -> None:
    with RawServer(says(b"")) as server:
        started(client, server)
        assert client.wait(0, 0) == client.wait(0, 3000) == client.latest(0) == {"code": 0, "error": ""}


def test_a_service_that_does_not_read_is_given_up_without_waiting(client: Driver) -> None:
    enough = threading.Event()

    def deed(talk: Talk) -> None:
        talk.greet()
        enough.wait()

    with RawServer(deed) as server:
        client.connect(server.url, max_sequences=1000)
        everyone = range(1000)
        client("open", everyone)
        while (answer := client.start(everyone))["code"] == OK:
            answer = client.route(everyone, [[[0, 1]] * 4] * 1000)
        enough.set()
    assert answer["code"] == GONE
    assert "did not read" in answer["error"]


def test_why_the_service_closed_is_told_though_telling_fails_first(client: Driver) -> None:
    with RawServer(
        says(frame(CLOSE, struct.pack(">H", 1001) + b"the service stopped"), then=hang_up)
    ) as server:
        started(client, server)
        answer = until(lambda: (told := client("ask", [0]))["code"] and told)
    assert answer["code"] == GONE
    assert (
        "the service stopped" in answer["error"] or "hung up" in answer["error"] or "reset" in answer["error"]
    )
