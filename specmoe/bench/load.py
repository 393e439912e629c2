"""The load: keep-alive connections that send one request again and again, in a process of its own.

One thread waits on all sockets and reads answers whole: a client with more comforts costs more than the
server it measures. `specmoe.bench.orders` tells how it is told what to do.

    python -m specmoe.bench.load [CORE]
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from specmoe.bench.orders import Worker, carry_out, worker
from specmoe.bench.polling import awaited
from specmoe.bench.processes import Address, connect
from specmoe.errors import BadAnswer

OK = b"HTTP/1.1 200 "
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
HEAD_END = b"\r\n\r\n"
CHUNK = 1 << 16
ANSWER_SECONDS = 10.0


class Load:
    """Requests on order, by a process of their own."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def round(
        self, address: Address, request: bytes, connections: int, seconds: float, *, asleep: bool = False
    ) -> tuple[list[float], float]:
        """What `storm` gives. Raises BenchError where an answer was wrong."""
        order = {"address": address, "request": request.decode("latin-1"), "connections": connections}
        result = self._worker.order(**order, seconds=seconds, asleep=asleep)
        return result["times_us"], result["seconds"]


@contextlib.contextmanager
def load(core: int | None) -> Iterator[Load]:
    """The load, on this core, until the block ends."""
    with worker("specmoe.bench.load", core) as started:
        yield Load(started)


def storm(
    address: Address, request: bytes, connections: int, seconds: float, *, asleep: bool = False
) -> tuple[list[float], float]:
    """(microseconds of every request, seconds in all). Each connection has one request under way.

    asleep: see `awaited`.
    Raises BadAnswer, OSError.
    """
    opened = [connect(address, ANSWER_SECONDS) for _ in range(connections)]
    try:
        for connection in opened:  # the first request of a connection pays for the server's setup of it
            connection.sendall(request)
            read_answer(connection)
        return _one_round(opened, request, seconds, asleep)
    finally:
        for connection in opened:
            connection.close()


def read_answer(connection: socket.socket) -> bytes:
    """The body of one answer. Raises BadAnswer."""
    received = connection.recv(CHUNK)
    while (end := received.find(HEAD_END)) < 0:
        received += _more(connection)
    length = CONTENT_LENGTH.search(received, 0, end + 2)
    if not received.startswith(OK) or not length:
        raise BadAnswer(f"expected 200 with a Content-Length, got {received[:300]!r}")
    whole = end + len(HEAD_END) + int(length[1])
    while len(received) < whole:
        received += _more(connection)
    return received[end + len(HEAD_END) :]


def _one_round(
    opened: list[socket.socket], request: bytes, seconds: float, asleep: bool
) -> tuple[list[float], float]:
    times_us: list[float] = []
    sent = [0.0] * len(opened)
    clock = time.perf_counter
    with selectors.DefaultSelector() as selector:
        for number, connection in enumerate(opened):
            selector.register(connection, selectors.EVENT_READ, number)
        began = clock()
        for number, connection in enumerate(opened):
            sent[number] = clock()
            connection.sendall(request)
        under_way = len(opened)
        while under_way:
            for key in awaited(selector, asleep=asleep):
                connection = opened[key.data]
                read_answer(connection)
                now = clock()
                times_us.append((now - sent[key.data]) * 1e6)
                if now - began < seconds:
                    sent[key.data] = clock()
                    connection.sendall(request)
                else:
                    under_way -= 1
        return times_us, clock() - began


def _more(connection: socket.socket) -> bytes:
    received = connection.recv(CHUNK)
    if not received:
        raise BadAnswer("the server closed the connection")
    return received


def _carried_out(
    address: Address, request: str, connections: int, seconds: float, asleep: bool
) -> dict[str, Any]:
    times_us, took = storm(address, request.encode("latin-1"), connections, seconds, asleep=asleep)
    return {"times_us": times_us, "seconds": took}


if __name__ == "__main__":
    carry_out(sys.argv[1:], _carried_out)
