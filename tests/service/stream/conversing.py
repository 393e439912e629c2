"""The service's streams in this process, and a client's side of them without a socket.

async with conversing(store) as service:
    talk = await service.talk(every=2)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from service.app import create_app
from service.settings import Settings
from service.stream.host import Streams
from speculation.runtime import Speculator
from tests.service.in_process import wait_for
from tests.service.stream.frames import Message, binary, read, text
from tests.toy_version import toy_stored

# The version that the toy store serves.
SPECULATOR = Speculator(toy_stored(bias=-0.5), provider="cpu")


class FakeWire:
    """Keeps what is sent. closed: code and reason, once it is."""

    def __init__(self) -> None:
        self.congested = False
        self.sent: list[bytes | str] = []
        self.closed: tuple[int, str] | None = None

    def send(self, message: bytes | str) -> None:
        assert self.closed is None
        self.sent.append(message)

    def close(self, code: int, reason: str) -> None:
        assert self.closed is None and len(reason.encode()) <= 123
        self.closed = (code, reason)


class Talk:
    """One connection, from the client's side."""

    def __init__(self, streams: Streams, *, in_text: bool = False) -> None:
        self.wire = FakeWire()
        self.connection = streams.connect(self.wire)
        self._write = text if in_text else binary

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message, by the fields of its JSON form."""
        self.connection.receive(self._write({"type": kind, **fields}))

    def heard(self) -> list[Message]:
        """What came since the last time."""
        sent, self.wire.sent = self.wire.sent, []
        return [read(message) for message in sent]

    async def settled(self) -> list[Message]:
        """What came, once nothing more will come by itself."""
        await self.connection.greeting()
        for _ in range(3):
            await asyncio.sleep(0)
        while (
            not self.wire.congested and self.connection.conversation and self.connection.conversation.waits()
        ):
            await asyncio.sleep(0)
        return self.heard()

    async def forecasts(self, kind: str, **fields: Any) -> list[Message]:
        """Send a message; its forecasts."""
        self.say(kind, **fields)
        return [answer for answer in await self.settled() if answer["type"] in ("forecast", "union")]

    async def error(self, kind: str, **fields: Any) -> Message:
        """Send a message; the one error it is answered with."""
        self.say(kind, **fields)
        (answer,) = await self.settled()
        assert answer["type"] == "error"
        return answer

    def congest(self) -> None:
        """Read nothing any longer."""
        self.wire.congested = True

    def relieve(self) -> None:
        """Read again: what websocket.Listener does then."""
        self.wire.congested = False
        if self.connection.conversation:
            self.connection.conversation.hub.wake()

    def leave(self) -> None:
        """Hang up."""
        self.connection.lost()


class Service:
    """A running app: its streams, and a client to the rest of it."""

    def __init__(self, streams: Streams, client: httpx.AsyncClient) -> None:
        self.streams, self.client = streams, client

    def connect(self, *, in_text: bool = False) -> Talk:
        """A connection on which nothing was said."""
        return Talk(self.streams, in_text=in_text)

    async def talk(self, *, in_text: bool = False, **hello: Any) -> Talk:
        """A connection that was welcomed."""
        talk = self.connect(in_text=in_text)
        talk.say("hello", **({"model": "toy"} | hello))
        (welcome,) = await talk.settled()
        assert welcome["type"] == "welcome", welcome
        return talk

    async def metric(self, line: str) -> float:
        """A sample of /metrics, by its name and labels."""
        page = (await self.client.get("/metrics")).text
        return next(
            float(told.rpartition(" ")[2]) for told in page.splitlines() if told.startswith(line + " ")
        )

    @property
    def in_use(self) -> int:
        """Sequences that are open."""
        return sum(hub.slots.in_use for hub in self.streams.hubs("toy"))


@contextlib.asynccontextmanager
async def conversing(store: Path, **settings: Any) -> AsyncIterator[Service]:
    """An app that is ready."""
    app = create_app(Settings(store=str(store), provider="cpu", **settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service") as client,
    ):
        await wait_for(client, "/readyz", lambda answer: answer.status_code == 200)
        yield Service(app.state.streams, client)
