"""One stream: from its first message, which must be hello, to its end. Knows no socket: see `websocket.py`.

Wire -> Connection.receive -> Conversation; Conversation -> Connection.send -> Wire

.venv/bin/python -m pytest tests/service/stream/test_conversation.py
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol

import orjson

from service.errors import MessageUnreadable
from service.loading import Running
from service.problems import INTERNAL, problem
from service.stream import binary, text
from service.stream.binary import HEADER, Binary
from service.stream.conversation import Conversation
from service.stream.forecasts import Forecasts
from service.stream.hub import Hub
from service.stream.messages import Encoding, Hello, Message, Welcome
from service.stream.text import Text
from traces.spec import RoutingSpec

log = logging.getLogger(__name__)

# Messages that may wait while hello is looked into: the version may have to be loaded first.
MAX_WAITING = 64
MAX_WAITING_BYTES = 1 << 20
NORMAL, INTERNAL_ERROR, UNREADABLE = 1000, 1011, 4400
# By HTTP status of the error; any other one: what came was wrong.
CLOSE_CODES = {404: 4404, 408: 4408, 429: 4429, 500: INTERNAL_ERROR, 503: 4503}
REASON_BYTES = 120


class Wire(Protocol):
    """Where messages go. congested: the other side does not read as fast as it is told."""

    @property
    def congested(self) -> bool: ...

    def send(self, message: bytes | str) -> None: ...

    def close(self, code: int, reason: str) -> None: ...


class Host(Protocol):
    """What a connection needs of the service around it."""

    def welcome(self, hello: Hello, running: Running) -> Welcome: ...

    async def running(self, hello: Hello) -> Running: ...

    def hub(self, running: Running) -> Hub: ...

    def leave(self, connection: Connection) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...

    def count(self, outcome: str) -> None: ...


class Connection:
    """A client's side. conversation: None until hello was answered."""

    def __init__(self, host: Host, wire: Wire) -> None:
        self.conversation: Conversation | None = None
        self.encoding: Encoding = Text()
        self._host, self._wire = host, wire
        self._spec: RoutingSpec | None = None
        self._greeting: asyncio.Task[None] | None = None
        self._waiting: list[bytes | str] = []
        self._closed = False

    @property
    def congested(self) -> bool:
        """The client does not read as fast as it is told."""
        return self._wire.congested

    @property
    def greeted(self) -> bool:
        """Whether hello came."""
        return self._greeting is not None

    def receive(self, frame: bytes | str) -> None:
        """A message, as it came."""
        if self._closed:
            return
        if self._greeting and not self.conversation:
            self._wait(frame)
            return
        if not self.conversation:
            self.encoding = Binary() if isinstance(frame, bytes) else Text()
        try:
            self._take(frame)
        except Exception as error:  # whatever it is, the client must hear of it, and the others go on
            self.refuse(error, tag_of(frame), fatal=False)
        else:
            self._host.count("ok")

    def send(self, message: bytes | str) -> None:
        """A forecast."""
        self._wire.send(message)

    def tell(self, message: bytes | str) -> None:
        """Something that must not be dropped; who does not read it is not talked to any longer."""
        if self._closed:
            return
        if self._wire.congested:
            self.close(CLOSE_CODES[429], "messages are not read")
        else:
            self._wire.send(message)

    async def greeting(self) -> None:
        """Until hello was answered, if it came."""
        if self._greeting:
            await self._greeting

    def refuse(self, error: Exception, tag: int = 0, *, fatal: bool = True) -> None:
        """Tell what is wrong; end the connection where it cannot go on."""
        found = problem(error)
        if found.kind is INTERNAL:
            log.error("stream failed", exc_info=error)
        self._host.count(found.kind.code)
        fatal = fatal or isinstance(error, MessageUnreadable) or found.kind is INTERNAL or not self.greeted
        self.tell(self.encoding.error(tag, found.kind.code, found.message, found.remedy, fatal=fatal))
        if fatal:
            reason = found.message.encode()[:REASON_BYTES].decode(errors="ignore")
            self.close(CLOSE_CODES.get(found.kind.status, UNREADABLE), reason)

    def close(self, code: int, reason: str) -> None:
        """End it from this side."""
        if not self._closed:
            self._wire.close(code, reason)
            self.lost()

    def lost(self) -> None:
        """It has ended, from whichever side: forget its sequences."""
        if not self._closed:
            self._closed = True
            if self.conversation:
                self.conversation.forget_all()
            self._waiting.clear()
            self._host.leave(self)

    def _take(self, frame: bytes | str) -> None:
        message: Message
        if isinstance(frame, bytes):
            message = binary.decode(frame, self._spec)
        else:
            message = text.parse(frame, self._spec)
        if self.conversation:
            if isinstance(message, Hello):
                raise MessageUnreadable(
                    "hello came twice.", remedy="Open another connection for another model."
                )
            self.conversation.take(message)
        elif isinstance(message, Hello):
            self._greeting = self._host.spawn(self._greet(message))

    async def _greet(self, hello: Hello) -> None:
        try:
            running = await self._host.running(hello)
            forecasts = Forecasts(hello, running)
            if self._closed:
                return
            self.conversation = Conversation(self._host.hub(running), hello, forecasts, self)
        except Exception as error:
            self.refuse(error, hello.tag)
            return
        self._spec = running.speculator.spec
        if isinstance(self.encoding, Binary):
            self.encoding = Binary(self._spec.num_experts)
        self.tell(self.encoding.welcome(self._host.welcome(hello, running)))
        waiting, self._waiting = self._waiting, []
        for frame in waiting:
            self.receive(frame)

    def _wait(self, frame: bytes | str) -> None:
        self._waiting.append(frame)
        if len(self._waiting) > MAX_WAITING or sum(map(len, self._waiting)) > MAX_WAITING_BYTES:
            self.refuse(
                MessageUnreadable(
                    f"More than {MAX_WAITING} messages, or {MAX_WAITING_BYTES} bytes, came before welcome.",
                    remedy="Wait for welcome.",
                )
            )


def tag_of(frame: bytes | str) -> int:
    """The tag of a message, however wrong the rest of it is; 0 where it has none."""
    if isinstance(frame, bytes):
        return int(HEADER.unpack_from(frame)[3]) if len(frame) >= HEADER.size else 0
    try:
        tag = orjson.loads(frame)["tag"]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return 0
    return tag if type(tag) is int and 0 <= tag < 2**32 else 0
