"""The load of a stream against a service that answers right, and against one that does not."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from specmoe.bench.flow import Flow
from specmoe.bench.stream_load import decode
from specmoe.errors import BadAnswer
from tests.benchmarks.test_stream_frames import unmasked
from tests.toy_version import TOY_SPEC

FLOW = Flow("toy", 1, TOY_SPEC.num_layers, TOY_SPEC.num_experts, TOY_SPEC.top_k, sequences=2)
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
OPEN, START, ROUTING, WELCOME, FORECAST, ERROR = 2, 4, 5, 128, 129, 131

Answering = Callable[[int, int], list[bytes]]


def message(kind: int, first_layer: int = 0, count: int = 0) -> bytes:
    """A message in a frame."""
    return b"\x82\x10" + struct.pack("<BBHIHHI", kind, 0, count, 0, first_layer, 0, 0)


def forecast(kind: int, layer: int) -> list[bytes]:
    """What a service says to a message of this kind: `layer` is the next one, 0 after start."""
    if kind == OPEN:
        return [message(WELCOME)]
    return [message(FORECAST, layer, FLOW.sequences)] if layer < FLOW.num_layers else []


def one_by_one(kind: int, layer: int) -> list[bytes]:
    """The same, with a forecast for each sequence."""
    whole = forecast(kind, layer)
    return whole if kind == OPEN else [message(FORECAST, layer, 1)] * FLOW.sequences * len(whole)


def wrong_layer(kind: int, layer: int) -> list[bytes]:
    """Right while a connection opens, wrong from then on."""
    return forecast(kind, layer if layer == FLOW.num_layers - 1 else 2)


def refusing(kind: int, layer: int) -> list[bytes]:
    """An error for every token."""
    return [message(ERROR)] if kind == START else forecast(kind, layer)


def serve(listener: socket.socket, answering: Answering) -> None:
    """One connection, a message at a time."""
    connection, _ = listener.accept()
    # Who was told nonsense hangs up, perhaps before all of it was sent.
    with connection, suppress(ConnectionError), connection.makefile("rb") as reader:
        while reader.readline().strip():
            pass
        connection.sendall(SWITCHING)
        while head := reader.read(2):
            size = head[1] & 0x7F
            more = reader.read(2) if size == 126 else b""
            size = int.from_bytes(more, "big") if more else size
            (told,) = unmasked(head + more + reader.read(4 + size))
            kind, _, _, _, first, layers, _ = struct.unpack_from("<BBHIHHI", told)
            if kind in (OPEN, START, ROUTING):
                connection.sendall(b"".join(answering(kind, first + layers)))


@contextmanager
def serving(folder: Path, answering: Answering) -> Iterator[str]:
    """Such a service: the path of its socket."""
    path = str(folder / "s.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        threads = [threading.Thread(target=serve, args=(listener, answering), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        yield path


@pytest.mark.parametrize("answering", [forecast, one_by_one])
def test_every_turn_is_timed_once(tmp_path: Path, answering: Answering) -> None:
    with serving(tmp_path, answering) as address:
        times = decode(address, FLOW, 3, 0.05)
    turns = len(times.start_us) + len(times.layer_us)
    assert len(times.start_us) >= 3
    # Of a token's four turns one is its start; each connection may be within a token.
    assert turns / 4 <= len(times.start_us) <= turns / 4 + 3
    assert sum(times.start_us + times.layer_us) / 1e6 <= 3 * times.seconds


@pytest.mark.parametrize(
    ("answering", "said"),
    [(wrong_layer, "expected forecast 0"), (refusing, "refused a message")],
    ids=["another forecast", "an error"],
)
def test_another_answer_ends_the_measurement(tmp_path: Path, answering: Answering, said: str) -> None:
    with serving(tmp_path, answering) as address, pytest.raises(BadAnswer, match=said):
        decode(address, FLOW, 1, 0.05)


def test_a_service_without_streams_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(BadAnswer, match="expected 101"):
            decode(path, FLOW, 1, 0.05)
        thread.join()
