"""The stream's messages as one request: for callers that want its compact frames, but no connection.

POST /v1/predict, application/octet-stream: each message with its length before it (u32, little-endian), from
hello on; the answer is the forecasts, written the same way. docs/stream-protocol.md tells the messages.

.venv/bin/python -m pytest tests/service/stream/test_once.py
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator

from service.errors import MessageUnreadable
from service.loading import Running
from service.problems import problem
from service.stream.connection import Connection
from service.stream.host import Streams
from service.stream.messages import Kind

LENGTH = struct.Struct("<I")
REMEDY = "Put the length of each message before it, as a little-endian u32, and begin with hello."


class Once(Connection):
    """A connection that lasts for one request. failure: the first error, which ends it."""

    def __init__(self, streams: Streams) -> None:
        self.wire = _Collected()
        self.failure: Exception | None = None
        super().__init__(streams, self.wire)

    def refuse(self, error: Exception, tag: int = 0, *, fatal: bool = True) -> None:
        """Whatever is wrong, the request has failed."""
        self.failure = self.failure or error
        self._host.count(problem(error).kind.code)
        self.lost()


async def answer(body: bytes, streams: Streams) -> tuple[bytes, Running]:
    """(the forecasts, the version that made them). Raises what a stream would be told as an error."""
    once = Once(streams)
    try:
        for message in _messages(body):
            once.receive(message)
            await once.greeting()
            if once.failure:
                raise once.failure
        if once.conversation is None:
            raise MessageUnreadable("The body holds no message.", remedy=REMEDY)
        while once.conversation.waits():
            await asyncio.sleep(0)
        if once.failure:
            raise once.failure
        return once.wire.forecasts(), once.conversation.hub.running
    finally:
        once.lost()


class _Collected:
    """A wire that keeps what is sent."""

    congested = False

    def __init__(self) -> None:
        self._sent: list[bytes] = []

    def send(self, message: bytes | str) -> None:
        """Keep it. A binary hello is answered in bytes."""
        if isinstance(message, bytes):
            self._sent.append(message)

    def close(self, code: int, reason: str) -> None:
        """Nothing is open."""

    def forecasts(self) -> bytes:
        """All of them, each behind its length."""
        told = [message for message in self._sent if message[0] in (Kind.FORECAST, Kind.UNION)]
        return b"".join(LENGTH.pack(len(message)) + message for message in told)


def _messages(body: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(body):
        start = place + LENGTH.size
        if start > len(body):
            raise MessageUnreadable(f"The body ends within a length, at byte {place}.", remedy=REMEDY)
        end = start + LENGTH.unpack_from(body, place)[0]
        if end > len(body):
            raise MessageUnreadable(
                f"The message at byte {start} has {end - start} bytes; {len(body) - start} are left.",
                remedy=REMEDY,
            )
        yield body[start:end]
        place = end
