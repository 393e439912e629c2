"""The toy service of `toy_book.py` behind real sockets, misbehaving as told.

with ToyStream() as server:
    Stream(server.url, model="toy")
    server.connections[0].cut()
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve, unix_serve

from tests.contract.toy_book import HEADER, Behaviour, Book

# No extensions, and no waiting for clients that do not answer.
PLAIN: dict[str, Any] = {"compression": None, "ping_interval": None, "close_timeout": 0.1}


class ToyStream:
    """Listens on a free TCP port, on `port`, or on the Unix socket `uds`. behaviour: of later connections."""

    def __init__(self, behaviour: Behaviour | None = None, *, port: int = 0, uds: str | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.connections: list[Talk] = []
        self._stopping = False
        if uds is None:
            self._server = serve(self._talk, "127.0.0.1", port, **PLAIN)
            self.port = self._server.socket.getsockname()[1]
        else:
            self._server = unix_serve(self._talk, uds, **PLAIN)
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        for talk in self.connections:
            talk.cut()
        self._server.shutdown()
        self._thread.join()

    def _talk(self, connection: ServerConnection) -> None:
        if connection.socket.family != socket.AF_UNIX:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert connection.request is not None
        assert connection.request.path.endswith("/v1/stream")
        talk = Talk(connection, self.behaviour)
        self.connections.append(talk)
        if self._stopping:  # it came back before nothing listened any longer
            talk.cut()
        talk.run()


class Talk:
    """One connection: its `book`, and what else can happen to it. over: it has ended."""

    def __init__(self, connection: ServerConnection, behaviour: Behaviour) -> None:
        self.book = Book(behaviour)
        self.over = threading.Event()
        self._connection, self._behaviour = connection, behaviour
        self._lock = threading.Lock()

    @property
    def closed_with(self) -> int | None:
        """The close code."""
        return self._connection.close_code

    def run(self) -> None:
        """Until it is over."""
        try:
            for frame in self._connection:
                self.act(lambda book, frame=frame: book.take(frame))
                if self.book.closed is not None:
                    self._connection.close(self.book.closed, "It is so.")
                while self._behaviour.deaf and not self.over.is_set():
                    time.sleep(0.005)
        except ConnectionClosed:
            pass
        finally:
            self.over.set()

    def act(self, deed: Callable[[Book], None]) -> None:
        """Do something to the book, and say what comes of it."""
        with self._lock, contextlib.suppress(ConnectionClosed):
            deed(self.book)
            for answer in self.book.answers:
                self._connection.send(answer)
            self.book.answers.clear()

    def say(self, message: bytes | str) -> None:
        """Anything."""
        self.act(lambda book: book.answers.append(message))

    def say_goodbye(self, milliseconds: int) -> None:
        """The service will stop."""
        self.say(HEADER.pack(132, 0, 0, 0, 0, 0, milliseconds))

    def fail(self, tag: int, code: str) -> None:
        """An error that ends nothing."""
        self.act(lambda book: book.fail(tag, code))

    def close(self, code: int, reason: str = "so") -> None:
        """As a service closes."""
        self._connection.close(code, reason)

    def write(self, data: bytes) -> None:
        """Bytes, whatever they are."""
        self._connection.socket.sendall(data)

    def cut(self) -> None:
        """No close frame, nothing."""
        self.over.set()
        with contextlib.suppress(OSError):
            self._connection.socket.shutdown(socket.SHUT_RDWR)
