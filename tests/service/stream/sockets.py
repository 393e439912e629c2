"""The service on a real socket, in a thread of this process, and a WebSocket client that may do all wrong.

with served(store) as server, server.socket() as client:
    client.send(OPCODE_BINARY, message)
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from service.app import create_app
from service.listening import listening
from service.server import Server
from service.settings import Settings
from service.stream.host import Streams
from service.stream.websocket import websocket_protocol
from specmoe.commands.serve import server_config
from tests.service.stream.frames import Message, binary, read

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: service\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n{more}\r\n"
)


class Served:
    """A running server. where: its host and port."""

    def __init__(self, streams: Streams, server: Server, where: tuple[str, int]) -> None:
        self.streams, self.server, self.where = streams, server, where

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.where)

    def socket(self, **options: Any) -> RawSocket:
        """A client that shook hands."""
        return RawSocket(self.where, **options)

    @property
    def in_use(self) -> int:
        """Sequences that are open."""
        return sum(hub.slots.in_use for hub in self.streams.hubs("toy"))


@contextlib.contextmanager
def served(store: Path, **options: Any) -> Iterator[Served]:
    """As `specmoe serve`, until the block ends."""
    settings = Settings(
        **({"store": str(store), "provider": "cpu", "port": 0, "shutdown_seconds": 1} | options)
    )
    app = create_app(settings)
    with listening(settings) as listener:
        config = server_config(app, settings, websocket_protocol(app.state.streams))
        server = Server(config, app.state.streams, settings.shutdown_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        serving = app.state.streams._serving
        until(lambda: server.started and not serving.unready())
        try:
            yield Served(app.state.streams, server, listener.getsockname()[:2])
        finally:
            server.should_exit = True
            thread.join()


def until(fulfilled: Callable[[], Any]) -> Any:
    """Wait for it; the test fails after 10 s."""
    end = time.monotonic() + 10
    while not (found := fulfilled()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


class RawSocket:
    """A WebSocket client without a library between it and the wire. answer: to its handshake."""

    def __init__(
        self, where: tuple[str, int], path: str = "/v1/stream", more: str = "", receive_buffer: int = 0
    ) -> None:
        self._socket = socket.socket()
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(10)
        self._socket.connect(where)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(HANDSHAKE.format(path=path, key=key, more=more).encode())
        self._read = self._socket.makefile("rb")
        self.answer = b""
        while (line := self._read.readline()) not in (b"\r\n", b""):
            self.answer += line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def send(
        self, opcode: int, payload: bytes, *, last: bool = True, masked: bool = True, bits: int = 0
    ) -> None:
        """One frame. bits: the reserved ones."""
        length = len(payload)
        form, told = ("", 126) if length < 126 else (("H", 126) if length < 65536 else ("Q", 127))
        head = struct.pack(
            f">BB{form}",
            last << 7 | bits << 4 | opcode,
            masked << 7 | (told if form else length),
            *([length] if form else []),
        )
        # The mask of zeros: legal, and what is sent can be read.
        self._socket.sendall(head + (bytes(4) if masked else b"") + payload)

    def send_raw(self, sent: bytes) -> None:
        """Anything."""
        self._socket.sendall(sent)

    def say(self, kind: str, **fields: Any) -> None:
        """A binary message, by the fields of its JSON form."""
        self.send(BINARY, binary({"type": kind, **fields}))

    def receive(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload. EOFError where the connection is over."""
        head = self._exactly(2)
        assert head[0] & 0xF0 == 0x80 and not head[1] & 0x80  # whole, no reserved bits, no mask
        length = head[1]
        if length == 126:
            (length,) = struct.unpack(">H", self._exactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._exactly(8))
        return head[0] & 15, self._exactly(length)

    def hear(self) -> Message:
        """The next message."""
        opcode, payload = self.receive()
        assert opcode in (TEXT, BINARY), (opcode, payload)
        return read(payload if opcode == BINARY else payload.decode())

    def closed(self) -> tuple[int, str]:
        """Code and reason with which the service closes next, and hangs up."""
        opcode, payload = self.receive()
        assert opcode == CLOSE, (opcode, payload)
        self.send(CLOSE, payload[:2])
        with contextlib.suppress(ConnectionError):
            assert self._read.read() == b""
        return struct.unpack(">H", payload[:2])[0], payload[2:].decode()

    def greet(self, **hello: Any) -> Message:
        """Say hello to the toy; the welcome."""
        self.say("hello", **({"model": "toy"} | hello))
        return self.hear()

    def cut(self) -> None:
        """Be gone, without a word."""
        self._read.close()
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = self._read.read(count)
        if len(data) < count:
            raise EOFError
        return data
