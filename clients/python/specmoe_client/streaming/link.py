"""A WebSocket that never makes its caller wait: sends what the kernel takes, receives what has come.

connecting.py opens it; conversation.py sends and receives

Framing is that of the websockets package. Writing and reading frames by hand was measured to save 5 µs of a
round trip: not worth a second implementation of RFC 6455.
"""

from __future__ import annotations

import collections.abc
import contextlib
import select
import socket
from dataclasses import dataclass

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState, ProtocolError
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import Event

RECEIVE_BYTES = 1 << 16
# What is told while the service does not read; beyond it the connection is given up. Some 200,000 messages.
MAX_PENDING_BYTES = 16 << 20
NORMAL, INVALID, ABNORMAL = 1000, 1002, 1006
# select() takes lower descriptors only, but waits for microseconds where poll() counts milliseconds.
SELECTABLE = 1024


@dataclass(frozen=True)
class Lost:
    """Why a link ended: a close code, 1006 where the service sent none, and its words or ours."""

    code: int
    reason: str


class Link:
    """A connection whose handshake is over. early: frames that came together with the handshake's answer.

    lost: why the link is of no use any longer, None while it is.
    failing: why it cannot send, "" while it can; what has come can still be read.
    received: bytes that came so far, control frames included.
    """

    def __init__(self, connection: socket.socket, protocol: ClientProtocol, early: list[Event]) -> None:
        connection.setblocking(False)
        self.lost: Lost | None = None
        self.failing = ""
        self.received = 0
        self._socket, self._protocol, self._early = connection, protocol, early
        self._pending = bytearray()
        self._spoken = False

    def fileno(self) -> int:
        """The socket's descriptor, for event loops."""
        return self._socket.fileno()

    @property
    def pending(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return len(self._pending)

    def send(self, messages: collections.abc.Iterable[bytes]) -> None:
        """Send messages, or keep what the kernel does not take for the next call."""
        try:
            for message in messages:
                self._protocol.send_binary(message)
        except InvalidState:
            self.failing = "the service is closing the connection"
            return
        self._flush()

    def send_within(self, messages: collections.abc.Iterable[bytes], seconds: float) -> None:
        """Send messages and wait until the kernel has taken them. Who does not read for so long is lost."""
        self.send(messages)
        while self._pending and not self.failing:
            before = len(self._pending)
            self._select([], [self._socket], seconds)
            self._flush()
            if len(self._pending) == before:
                self._end(ABNORMAL, f"the service did not read for {seconds:g} s")
                return

    def ping(self) -> None:
        """Ask for a sign of life."""
        with contextlib.suppress(InvalidState):
            self._protocol.send_ping(b"")
        self._flush()

    def receive(self) -> list[bytes]:
        """The messages that have come since, in order. Pings are answered, a close is noted in `lost`."""
        messages: list[bytes] = []
        if self._early:
            early, self._early = self._early, []
            self._sort(early, messages)
        while self.lost is None:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._end(ABNORMAL, _said(error))
                break
            if not data:
                self._end(ABNORMAL, "the service hung up")
                break
            self.received += len(data)
            self._protocol.receive_data(data)
            self._sort(self._protocol.events_received(), messages)
            if len(data) < RECEIVE_BYTES:
                break
        self._flush()
        if self.failing:
            self._end(ABNORMAL, self.failing)
        return messages

    def wait(self, seconds: float) -> None:
        """Wait until something came, or what is kept can be sent, or the time is over."""
        if not self._early:
            self._select([self._socket], [self._socket] if self._pending else [], seconds)

    def close(self) -> None:
        """Say so, as far as that takes no time, and hang up."""
        with contextlib.suppress(InvalidState, OSError):
            if self.lost is None:
                self._protocol.send_close(NORMAL)
                self._flush()
                self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()

    def _sort(self, events: list[Event], messages: list[bytes]) -> None:
        for event in events:
            if not isinstance(event, Frame):
                continue
            if event.opcode is Opcode.BINARY and event.fin:
                # It may be a bytearray, and arrays are to be views of something that cannot change.
                messages.append(bytes(event.data))
                self._spoken = True
            elif event.opcode is Opcode.CLOSE:
                self._end(*_code_and_reason(event))
            elif event.opcode not in (Opcode.PING, Opcode.PONG) and self._spoken:
                # Before hello the service knows no better; the reason of its close is the same in short.
                self._end(INVALID, "the service sent text, or a message in fragments")
        if self._protocol.parser_exc is not None:
            self._end(INVALID, f"the service sent no WebSocket frame ({self._protocol.parser_exc})")

    def _flush(self) -> None:
        data = b"".join(self._protocol.data_to_send())
        if self.failing or not (data or self._pending):
            return
        if self._pending:
            self._pending += data
        try:
            sent = self._socket.send(self._pending or data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.failing = _said(error)
            return
        if self._pending:
            del self._pending[:sent]
        elif sent < len(data):
            self._pending += data[sent:]
        if len(self._pending) > MAX_PENDING_BYTES:
            self.failing = f"the service did not read {len(self._pending)} bytes"

    def _select(self, reading: list[socket.socket], writing: list[socket.socket], seconds: float) -> None:
        if self._socket.fileno() < SELECTABLE:
            select.select(reading, writing, [], seconds)
            return
        poll = select.poll()
        poll.register(self._socket, (select.POLLIN if reading else 0) | (select.POLLOUT if writing else 0))
        poll.poll(seconds * 1000)

    def _end(self, code: int, reason: str) -> None:
        if self.lost is None:
            self.lost = Lost(code, reason)


def _said(error: OSError) -> str:
    return f"{type(error).__name__}: {error}"


def _code_and_reason(frame: Frame) -> tuple[int, str]:
    try:
        close = Close.parse(bytes(frame.data))
    except (ProtocolError, UnicodeDecodeError):
        return ABNORMAL, "the service closed with a frame that cannot be read"
    return close.code, close.reason
