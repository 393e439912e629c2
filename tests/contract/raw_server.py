"""A stream service of bytes: accepts one connection after the other and does to each what a test says.

with RawServer(lambda talk: talk.connection.sendall(b"220 mail.example ready")) as server:
    client.connect(server.url)
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

HEADER = struct.Struct("<BBHIHHI")
LAYERS, EXPERTS, TOP_K = 4, 8, 2
PATIENCE_S = 10.0


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """As a service writes it."""
    length = len(payload)
    if length < 126:
        size = bytes([length])
    elif length < 1 << 16:
        size = b"\x7e" + struct.pack(">H", length)
    else:
        size = b"\x7f" + struct.pack(">Q", length)
    return bytes([final << 7 | opcode]) + size + payload


def welcome(*, layers: int = LAYERS, experts: int = EXPERTS, protocol: int = 1) -> bytes:
    """The message that answers hello."""
    limits = 4096, 1 << 20, 4096, 300
    return HEADER.pack(128, 3, 0, 0, 0, 0, 2) + struct.pack(
        "<HHHHIIII", layers, experts, TOP_K, protocol, *limits
    )


def forecast(
    *,
    kind: int = 129,
    count: int = 1,
    first: int = 0,
    layers: int = 1,
    wire: int = 0,
    token: int = 0,
    body: bytes | None = None,
) -> bytes:
    """Of sequence 0's first token: experts 5 and 3 with 0.75 and 0.5, unless told otherwise."""
    ranking = struct.pack("<ffHBB", 0.75, 0.5, 2, 5, 3)
    numbers = struct.pack("<II", wire, token)
    return HEADER.pack(kind, 0, count, 0, first, layers, 0) + numbers + (ranking if body is None else body)


class Talk:
    """One connection. masks: of the client's frames."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.masks: list[bytes] = []

    def read(self, count: int) -> bytes:
        """So many bytes. Raises ConnectionError where the client hangs up before."""
        data = b""
        while len(data) < count:
            part = self.connection.recv(count - len(data))
            if not part:
                raise ConnectionError("the client hung up")
            data += part
        return data

    def request(self) -> bytes:
        """The opening handshake's first half."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.read(1)
        return head

    def upgrade(self, head: bytes, more: bytes = b"", *, accept: bytes = b"", lines: bytes = b"") -> None:
        """The second half, `more` in the same write. accept, lines: what is odd about it."""
        key = head.split(b"Sec-WebSocket-Key: ")[1].split(b"\r\n")[0]
        digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest()
        self.connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: WebSocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept:  "
            + (accept or base64.b64encode(digest))
            + b" \r\n"
            + lines
            + b"\r\n"
            + more
        )

    def greet(self, words: bytes | None = None) -> None:
        """Up to the welcome, or other words in its place."""
        self.upgrade(self.request())
        self.message()
        self.connection.sendall(frame(2, welcome()) if words is None else words)

    def message(self) -> tuple[int, bytes]:
        """(opcode, payload) of a frame of the client, which must be whole and masked."""
        first, second = self.read(2)
        assert first & 0xF0 == 0x80, "in fragments, or with an extension"
        assert second & 0x80, "not masked"
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", self.read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self.read(8))
        mask, masked = self.read(4), self.read(length)
        self.masks.append(mask)
        return first & 0x0F, bytes(byte ^ mask[number % 4] for number, byte in enumerate(masked))


class RawServer:
    """Listens on a free TCP port. failed: what went wrong in `deed`, None where nothing did."""

    def __init__(self, deed: Callable[[Talk], None]) -> None:
        self._deed = deed
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._connections: list[socket.socket] = []
        self.failed: Exception | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listening, *self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        assert kind is not None or self.failed is None, self.failed

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._connections.append(connection)
            with connection:
                connection.settimeout(PATIENCE_S)
                try:
                    self._deed(Talk(connection))
                except (ConnectionError, TimeoutError):
                    pass
                except Exception as error:
                    self.failed = error
                    return


def linger(talk: Talk) -> None:
    """Read until the client is gone."""
    with contextlib.suppress(OSError):
        while talk.connection.recv(1 << 16):
            pass
