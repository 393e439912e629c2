"""A tiny HTTP server that misbehaves as told, over real sockets: what a decode loop must survive.

with OddServer([status(503), answer(b"{}")]) as server:
    ...                                 # the first request gets 503, every later one {}
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


class OddServer:
    """Answers the i-th request by the i-th behaviour, and all later ones by the last.

    Counts `requests` and `connections`. Listens on a free TCP port, on `port`, or on the Unix socket `uds`.
    """

    def __init__(self, behaviours: Sequence[Behaviour], *, port: int = 0, uds: str | None = None) -> None:
        self._behaviours = behaviours
        self._uds = uds
        self.port = port
        self.requests = 0
        self.connections = 0
        self.bodies: list[bytes] = []
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await self._listen()
        if self._uds is None:
            self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> asyncio.Server:
        if self._uds is not None:
            return await asyncio.start_unix_server(self._accept, self._uds)
        return await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.add(asyncio.create_task(self._converse(reader, writer)))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            try:
                while not writer.is_closing():
                    await self._receive(reader)
                    await self._behaviours[min(self.requests, len(self._behaviours)) - 1](writer)
                    await writer.drain()
            finally:
                writer.close()
                await writer.wait_closed()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        self.bodies.append(await reader.readexactly(int(length[1]) if length else 0))
        self.requests += 1


def answer(body: bytes, status: str = "200 OK") -> Behaviour:
    """A proper HTTP response."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(_head(status, len(body)) + body)

    return behave


def refusal(status: int, code: str) -> Behaviour:
    """The service's error body."""
    body = f'{{"code":"{code}","message":"It is so.","remedy":"Do this.","request_id":"r1"}}'
    return answer(body.encode(), f"{status} Because")


async def silent(writer: asyncio.StreamWriter) -> None:
    """Takes the request and never answers."""
    await asyncio.Event().wait()


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Closes the connection instead of answering."""
    writer.close()


async def cut_off(writer: asyncio.StreamWriter) -> None:
    """Promises a thousand bytes, sends ten, closes."""
    writer.write(_head("200 OK", 1000) + b'{"model":"')
    writer.close()


async def no_http(writer: asyncio.StreamWriter) -> None:
    """Speaks something else."""
    writer.write(b"220 mail.example ready\r\n\r\n")
    writer.close()


async def trickle(writer: asyncio.StreamWriter) -> None:
    """Sends its header at once and its body without ever coming to an end, one byte at a time."""
    writer.write(_head("200 OK", 1 << 30))
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.005)


def _head(status: str, length: int) -> bytes:
    lines = f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {length}"
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
