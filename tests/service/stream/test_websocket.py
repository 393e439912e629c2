"""Streams on real sockets: handshakes, frames, closes, clients that are slow or gone, the service's end.

.venv/bin/python -m pytest tests/service/stream/test_websocket.py
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect, unix_connect

from service.stream import host, websocket
from tests.service.stream.frames import binary, frame, read, text
from tests.service.stream.sockets import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Served, served, until
from tests.service.test_process import Process, serve

HELLO = {"type": "hello", "model": "toy"}
OPEN = {"type": "open", "sequences": [7]}
START = {"type": "start", "sequences": [7]}
MAX_FRAME_BYTES = 4096


@pytest.fixture(scope="module")
def server(shared_store: Path) -> Iterator[Served]:
    with served(shared_store, max_frame_bytes=MAX_FRAME_BYTES) as server:
        yield server


def connected(process: Process) -> ClientConnection:
    if process.address.startswith("unix:"):
        return unix_connect(process.address.removeprefix("unix:"), "ws://service/v1/stream")
    return connect(process.address.replace("http", "ws") + "/v1/stream")


def ask(stream: ClientConnection, *messages: dict[str, Any]) -> dict[str, Any]:
    """Send messages; the next answer."""
    for message in messages:
        stream.send(binary(message))
    return read(stream.recv(10))


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_process_streams_says_goodbye_and_goes_on_until_its_time_is_over(
    shared_store: Path, tmp_path: Path, kind: str
) -> None:
    flags = ["--port", "0"] if kind == "tcp" else ["--uds", str(tmp_path / "s.sock")]
    with serve(shared_store, *flags, "--shutdown-seconds", "1") as process:
        with connected(process) as stream:
            assert ask(stream, HELLO)["type"] == "welcome"
            assert ask(stream, OPEN, START)["first_layer"] == 0
            process.process.terminate()
            assert read(stream.recv(10)) == {"type": "goodbye", "milliseconds": 1000}
            assert ask(stream, {"type": "ask", "sequences": [7], "tag": 9})["tag"] == 9
            with pytest.raises(OSError):
                connected(process)
            with pytest.raises(Exception, match=r"1001 .* the service stopped"):
                stream.recv(10)
        process.process.communicate(timeout=10)
    assert process.process.returncode == 0


def test_a_process_ends_in_time_though_a_client_reads_nothing(shared_store: Path) -> None:
    with serve(shared_store, "--port", "0", "--shutdown-seconds", "1") as process:
        where = ("127.0.0.1", int(process.address.rpartition(":")[2]))
        with Served(None, None, where).socket(receive_buffer=4096) as stream:  # type: ignore[arg-type]
            stream.greet(top_n=8)
            stream.say("open", sequences=list(range(500)))
            stream.say("start", sequences=list(range(500)))
            for _ in range(40):
                stream.say("ask", sequences=list(range(500)))
            process.process.terminate()
            process.process.communicate(timeout=10)
    assert process.process.returncode == 0


def test_a_library_that_offers_compression_gets_none(server: Served) -> None:
    with connect(server.url.replace("http", "ws") + "/v1/stream?any=thing") as stream:
        assert ask(stream, HELLO)["type"] == "welcome"
        assert stream.protocol.extensions == []


def test_text_is_answered_with_text(server: Served) -> None:
    with server.socket() as stream:
        stream.send(TEXT, text(HELLO).encode())
        opcode, payload = stream.receive()
        assert opcode == TEXT and read(payload.decode())["model"] == "toy"


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"path": "/v1/streams"}, b"404"),
        ({"path": "/"}, b"404"),
        ({"more": "Origin: http://localhost\r\n"}, b"403"),
        ({"more": "oRiGiN: null\r\n"}, b"403"),
    ],
    ids=["another path", "no path", "a page's origin", "an opaque origin"],
)
def test_a_handshake_is_refused(server: Served, options: Any, status: bytes) -> None:
    with server.socket(**options) as refused:
        assert refused.answer.startswith(b"HTTP/1.1 " + status)
        assert b"application/json" in refused.answer


def test_a_refused_handshake_says_what_to_do(server: Served) -> None:
    with pytest.raises(InvalidStatus) as refused, connect(server.url.replace("http", "ws") + "/v1/streams"):
        pass
    assert refused.value.response.body == (
        b'{"code":"not_found","message":"There is no WebSocket at this path.",'
        b'"remedy":"Connect to /v1/stream."}'
    )


def test_plain_http_is_told_to_upgrade(server: Served) -> None:
    answer = httpx.get(server.url + "/v1/stream")
    assert (answer.status_code, answer.json()["code"]) == (426, "upgrade_required")


def test_a_handshake_with_a_head_without_end_hurts_nobody(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        with server.socket(more=f"Cookie: {'c' * 40_000}\r\n") as refused:
            assert b"101" not in refused.answer
        with server.socket() as stream:
            assert stream.greet()["type"] == "welcome"
    assert [record for record in caplog.records if record.exc_info] == []


def test_the_socket_does_not_wait_for_acknowledgements(server: Served) -> None:
    with server.socket() as stream:
        stream.greet()
        (connection,) = server.streams._connections
        transport: Any = connection._wire._transport.underlying_transport  # type: ignore[attr-defined]
        accepted = transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_ping_is_answered_with_its_payload(server: Served) -> None:
    with server.socket() as stream:
        stream.send(PING, b"anyone?")
        assert stream.receive() == (PONG, b"anyone?")


def test_a_close_is_answered_and_frees_the_sequences(server: Served) -> None:
    with server.socket() as stream:
        stream.greet()
        stream.say("open", sequences=[7])
        stream.send(CLOSE, struct.pack(">H", 1000) + b"done")
        assert stream.closed() == (1000, "")
    until(lambda: server.in_use == 0)


@pytest.mark.parametrize(
    "sent", [b"", b"\x82", b"\x82\xfe\x10\x00" + bytes(100)], ids=["at once", "in a head", "in a body"]
)
def test_a_connection_that_is_cut_frees_the_sequences(server: Served, sent: bytes) -> None:
    with server.socket() as stream:
        stream.greet()
        stream.say("open", sequences=list(range(100)))
        stream.say("start", sequences=list(range(100)))
        until(lambda: server.in_use == 100)
        stream.send_raw(sent)
    until(lambda: server.in_use == 0)
    assert not server.streams._connections


def test_the_longest_message_is_taken_and_a_longer_one_ends_the_connection(server: Served) -> None:
    longest = binary({"type": "open", "sequences": list(range((MAX_FRAME_BYTES - 16) // 4))})
    with server.socket() as stream:
        assert stream.greet()["max_frame_bytes"] == len(longest) == MAX_FRAME_BYTES
        stream.send(BINARY, longest)
        stream.say("start", sequences=[7])
        assert stream.hear()["type"] == "forecast"
        stream.send(BINARY, longest + b"\0")
        assert stream.closed()[0] == 1009


UNREADABLE = {
    "garbage": (BINARY, b"garbage that is long enough", {}),
    "nothing": (BINARY, b"", {}),
    "not UTF-8": (TEXT, b'{"type": "\xff"}', {}),
    "not JSON": (TEXT, b"hello", {}),
    "a fragment": (BINARY, binary(OPEN), {"last": False}),
    "a fragment of text": (TEXT, text(OPEN).encode(), {"last": False}),
    "a continuation": (CONTINUATION, binary(OPEN), {}),
    "hello twice": (BINARY, binary(HELLO), {}),
    "compressed": (BINARY, binary(OPEN), {"bits": 4}),
}


@pytest.mark.parametrize(("opcode", "payload", "how"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_understood_is_told_and_ends_the_connection(
    server: Served, opcode: int, payload: bytes, how: Any
) -> None:
    with server.socket() as stream:
        stream.greet()
        stream.send(opcode, payload, **how)
        error = stream.hear()
        assert (error["code"], error["fatal"]) == ("unreadable_message", True)
        assert stream.closed() == (4400, error["message"][:120])


@pytest.mark.parametrize(
    ("opcode", "how"),
    [(BINARY, {"masked": False}), (3, {}), (PING, {"last": False})],
    ids=["unmasked", "opcode", "ping"],
)
def test_what_websocket_forbids_ends_the_connection(server: Served, opcode: int, how: Any) -> None:
    with server.socket() as stream:
        stream.greet()
        stream.say("open", sequences=[7])
        stream.send(opcode, binary(OPEN), **how)
        assert stream.closed()[0] == 1002
    until(lambda: server.in_use == 0)


def test_who_sends_on_and_on_still_hears_why_the_connection_ends(server: Served) -> None:
    with server.socket() as stream:
        stream.greet()
        stream.send(BINARY, frame(9))
        for _ in range(2000):
            stream.say("open", sequences=[7])
        assert stream.hear()["message"] == "kind is 9, expected 1 to 8."
        assert stream.closed()[0] == 4400


def test_a_model_that_is_not_served_ends_the_connection(server: Served) -> None:
    with server.socket() as stream:
        assert stream.greet(model="other")["code"] == "model_not_found"
        assert stream.closed()[0] == 4404


def test_who_says_no_hello_is_sent_away(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HELLO_SECONDS", 0.1)
    with server.socket() as stream:
        assert stream.hear()["code"] == "hello_timeout"
        assert stream.closed() == (4408, "No hello came within 0.1 s.")


def test_more_connections_than_allowed_are_told_so(shared_store: Path) -> None:
    with served(shared_store, max_streams=1) as server, server.socket() as stream:
        stream.greet()
        with server.socket() as refused:
            assert refused.hear()["code"] == "too_many_streams"
            assert refused.closed() == (4429, "1 streams are open, and no more are allowed.")
        stream.say("open", sequences=[7])
        stream.say("start", sequences=[7])
        assert stream.hear()["type"] == "forecast"


def test_who_is_silent_is_pinged_and_who_does_not_answer_is_dropped(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "PING_AFTER_SECONDS", 0.2)
    monkeypatch.setattr(websocket, "PONG_WITHIN_SECONDS", 0.2)
    with server.socket() as alive, server.socket() as dead:
        alive.greet()
        dead.greet()
        for _ in range(3):
            opcode, payload = alive.receive()
            assert opcode == PING
            alive.send(PONG, payload)
        assert dead.receive()[0] == PING
        with pytest.raises((EOFError, ConnectionError)):
            while True:
                assert dead.receive()[0] == CLOSE
        alive.say("open", sequences=[7])
        alive.say("start", sequences=[7])
        while (answer := alive.receive())[0] == PING:
            alive.send(PONG, answer[1])
        assert answer[0] == BINARY


def test_who_does_not_read_costs_no_memory_and_gets_the_newest_forecasts_later(server: Served) -> None:
    sequences, asked = list(range(300)), 0
    with server.socket(receive_buffer=4096) as stream:
        stream.greet(top_n=8)
        stream.say("open", sequences=sequences)
        stream.say("start", sequences=sequences)
        (connection,) = server.streams._connections
        transport = connection._wire._transport.underlying_transport  # type: ignore[attr-defined]
        while not connection.congested:
            stream.say("ask", sequences=sequences, tag=asked)
            asked += 1
            time.sleep(0.001)
        for _ in range(50):
            stream.say("ask", sequences=sequences, tag=asked)
            asked += 1
        largest = 16 + 300 * (8 + 4 * 8 * 5) + 10 + 8
        assert transport.get_write_buffer_size() <= websocket.WRITE_BUFFER_BYTES + largest
        told, tag, dropped = 0, -1, -1
        while tag < asked - 1:
            forecast = stream.hear()
            assert forecast["tag"] >= tag
            tag, dropped = forecast["tag"], forecast["dropped"]
            told += len(forecast["predictions"])
        assert told + dropped == 300 * (1 + asked)
        assert dropped > 300 * 40


def test_who_is_given_up_does_not_stay_in_memory(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "CLOSE_SECONDS", 0.2)
    sequences = list(range(300))
    with server.socket(receive_buffer=4096) as stream:
        stream.greet(top_n=8)
        stream.say("open", sequences=sequences)
        stream.say("start", sequences=sequences)
        (connection,) = server.streams._connections
        while not connection.congested:
            stream.say("ask", sequences=sequences)
            time.sleep(0.001)
        stream.say("close", sequences=[12345])
        until(lambda: not server.streams._connections)
        until(lambda: not server.server.server_state.connections)
