"""One connection to the stream: upgraded, told things, listened to. Nothing but a socket and frames.

specmoe bench --only memory
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from specmoe.bench.processes import Address, connect
from specmoe.bench.stream_frames import ERROR, UPGRADE, Answer, answers
from specmoe.errors import BadAnswer

CHUNK = 1 << 18
ANSWER_SECONDS = 10.0
HEAD_END = b"\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 "


class StreamClient:
    """A WebSocket. Raises BadAnswer where the service refuses something or hangs up, OSError."""

    def __init__(self, address: Address) -> None:
        self.socket = connect(address, ANSWER_SECONDS)
        self._received = bytearray()
        try:
            self._upgrade()
        except (BadAnswer, OSError):
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, frames: bytes) -> None:
        """Whole frames, already masked."""
        self.socket.sendall(frames)

    def receive(self) -> Iterator[Answer]:
        """The messages that are whole with what the next read brings; there may be none."""
        self._read()
        for answer in answers(self._received):
            if answer.kind == ERROR:
                raise BadAnswer(f"the service refused a message: {answer.message!r:.300}")
            yield answer

    def _upgrade(self) -> None:
        self.socket.sendall(UPGRADE)
        while (end := self._received.find(HEAD_END)) < 0:
            self._read()
        if not self._received.startswith(SWITCHING):
            raise BadAnswer(f"expected 101, got {bytes(self._received[:300])!r}")
        del self._received[: end + len(HEAD_END)]

    def _read(self) -> None:
        received = self.socket.recv(CHUNK)
        if not received:
            raise BadAnswer("the service closed the connection")
        self._received += received
