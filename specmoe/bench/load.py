"""The load: keep-alive connections that send one request again and again, in a process of its own.

One thread waits on all sockets and reads answers whole: a client with more comforts costs more than the
server it measures. Orders come as JSON lines on stdin, times go out as JSON lines on stdout.

    python -m specmoe.bench.load REQUEST_FILE [CORE]
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specmoe.bench.cores import pin

OK = b"HTTP/1.1 200 "
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
HEAD_END = b"\r\n\r\n"
CHUNK = 1 << 16
ANSWER_SECONDS = 10.0


class BadAnswer(Exception):
    """The server did not answer 200 with a body whose length it says."""


def main(arguments: Sequence[str]) -> None:
    """Carry out orders until stdin ends: {"address", "connections", "seconds"}."""
    request = Path(arguments[0]).read_bytes()
    pin(int(arguments[1]) if len(arguments) > 1 else None)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            times_us, seconds = storm(order["address"], request, order["connections"], order["seconds"])
            result: dict[str, Any] = {"times_us": times_us, "seconds": seconds}
        except (BadAnswer, OSError) as error:
            result = {"error": str(error) or type(error).__name__}
        print(json.dumps(result), flush=True)


def storm(
    address: str | list[Any], request: bytes, connections: int, seconds: float
) -> tuple[list[float], float]:
    """(microseconds of every request, seconds in all). Each connection has one request under way.

    address: [host, port], or the path of a Unix socket. Raises BadAnswer, OSError.
    """
    opened = [_connect(address) for _ in range(connections)]
    try:
        for connection in opened:  # the first request of a connection pays for the server's setup of it
            connection.sendall(request)
            read_answer(connection)
        return _one_round(opened, request, seconds)
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


def _one_round(opened: list[socket.socket], request: bytes, seconds: float) -> tuple[list[float], float]:
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
            for key, _ in selector.select(ANSWER_SECONDS) or _late():
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


def _late() -> list[Any]:
    raise BadAnswer(f"no answer within {ANSWER_SECONDS:g} s")


def _more(connection: socket.socket) -> bytes:
    received = connection.recv(CHUNK)
    if not received:
        raise BadAnswer("the server closed the connection")
    return received


def _connect(address: str | list[Any]) -> socket.socket:
    if isinstance(address, list):
        connection = socket.create_connection((address[0], address[1]), timeout=ANSWER_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(ANSWER_SECONDS)
    connection.connect(address)
    return connection


if __name__ == "__main__":
    main(sys.argv[1:])
