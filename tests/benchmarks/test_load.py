"""The load's own HTTP, against a socket that answers in any pieces."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoe.bench.cores import core_list
from specmoe.bench.load import read_answer, storm
from specmoe.errors import BadAnswer

BODY = b'{"predictions": []}'
HEAD = b"HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: %d\r\nX-Request-ID: a\r\n\r\n" % len(BODY)


def received(*pieces: bytes) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=lambda: [theirs.send(piece) for piece in pieces if piece])
        sender.start()
        try:
            return read_answer(ours)
        finally:
            sender.join()


@given(cut=st.integers(0, len(HEAD + BODY)))
def test_an_answer_may_come_in_pieces(cut: int) -> None:
    whole = HEAD + BODY
    assert received(whole[:cut], whole[cut:]) == BODY


@pytest.mark.parametrize(
    "answer",
    [HEAD.replace(b"200 OK", b"503 No") + BODY, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"],
    ids=["another status", "no length"],
)
def test_what_is_no_complete_200_ends_the_measurement(answer: bytes) -> None:
    with pytest.raises(BadAnswer, match="expected 200 with a Content-Length"):
        received(answer)


def test_a_closed_connection_ends_the_measurement() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(HEAD)
        theirs.close()
        with pytest.raises(BadAnswer, match="closed"):
            read_answer(ours)


def test_every_answer_is_timed_once_and_connections_take_part_alike(tmp_path: Path) -> None:
    path, served = str(tmp_path / "s.sock"), []

    def serve(connection: socket.socket) -> None:
        with connection:
            while connection.recv(100):
                served.append(1)
                connection.sendall(HEAD + BODY)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        servers = [threading.Thread(target=lambda: serve(listener.accept()[0])) for _ in range(3)]
        for server in servers:
            server.start()
        times_us, seconds = storm(path, b"POST", 3, 0.05)
        for server in servers:
            server.join()
    assert len(times_us) == len(served) - 3  # each connection's first answer is not timed
    assert len(times_us) >= 3
    assert sum(times_us) / 1e6 <= 3 * seconds


def test_the_kernels_way_to_write_cores_is_read() -> None:
    assert core_list("0,4-6\n") == {0, 4, 5, 6}
