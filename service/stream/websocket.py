"""The stream's WebSocket: uvicorn hands an upgraded connection over, picows frames it, `Connection` talks.

uvicorn (Upgrade: websocket) -> WebSocket -> Listener -> Connection

FastAPI's own WebSockets cost a task, a queue and two system calls a message; here a message is handled in the
callback in which it arrived. And uvicorn closes them at once when it stops, while streams are given time.

specmoe serve --uds /run/specmoe.sock
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, cast

import orjson
from picows import (
    WSAutoPingStrategy,
    WSCloseCode,
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
)
from picows.picows import WSProtocol  # type: ignore[attr-defined]  # compiled; only its stubs lack it

from service.errors import MessageUnreadable
from service.stream.connection import NORMAL
from service.stream.host import GOING_AWAY, Streams

PATH = "/v1/stream"
HANDSHAKE_SECONDS = 5.0
PING_AFTER_SECONDS = PONG_WITHIN_SECONDS = 20.0
# For the client's answer to a close.
CLOSE_SECONDS = 2.0
READ_BUFFER_BYTES = 16 << 10
# What is not read by the client fills the socket first, then this; beyond it forecasts wait.
WRITE_BUFFER_BYTES = 256 << 10

# Looked up for every message otherwise.
BINARY = WSMsgType.BINARY

# picows tells of every connection and every disconnection.
log = logging.getLogger(__name__)
log.setLevel(logging.WARNING)


class Listener(WSListener):
    """A WebSocket as a `Wire`."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.congested = False
        self._streams = streams
        self._hang_up: asyncio.TimerHandle | None = None

    def on_ws_connected(self, transport: WSTransport) -> None:
        """The handshake is over."""
        transport.underlying_transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._transport = transport
        self._connection = self._streams.connect(self)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """One frame; picows answers pings by itself."""
        kind = frame.msg_type
        if kind == BINARY and frame.fin and not (frame.rsv1 or frame.rsv2 or frame.rsv3):
            self._connection.receive(frame.get_payload_as_bytes())
        elif kind == WSMsgType.CLOSE:
            self._connection.close(NORMAL, "")  # does nothing where this side began
            transport.disconnect()
        elif kind == WSMsgType.CONTINUATION or not frame.fin:
            self._connection.refuse(
                MessageUnreadable("A message came in fragments.", remedy="Send each message as one frame.")
            )
        elif frame.rsv1 or frame.rsv2 or frame.rsv3:
            self._connection.refuse(
                MessageUnreadable("A frame uses an extension.", remedy="Send it as it is, not compressed.")
            )
        elif kind == WSMsgType.TEXT:
            self._receive_text(frame)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """The connection is gone, whoever ended it."""
        if self._hang_up:
            self._hang_up.cancel()
        self._connection.lost()

    def pause_writing(self) -> None:
        """The client does not read what it is told."""
        self.congested = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self.congested = False
        if self._connection.conversation:
            self._connection.conversation.hub.wake()

    def send(self, message: bytes | str) -> None:
        """A whole message."""
        if isinstance(message, bytes):
            self._transport.send(BINARY, message)
        else:
            self._transport.send(WSMsgType.TEXT, message.encode())

    def close(self, code: int, reason: str) -> None:
        """Say why; hang up when the client has answered.

        At once would be too early: where messages are still on their way from the client, the system would
        throw away what was sent and not read.
        """
        self._transport.send_close(cast(WSCloseCode, code), reason.encode())
        self._hang_up = asyncio.get_running_loop().call_later(
            CLOSE_SECONDS, self._transport.underlying_transport.abort
        )

    def _receive_text(self, frame: WSFrame) -> None:
        try:
            text = frame.get_payload_as_bytes().decode()
        except UnicodeDecodeError:
            self._connection.refuse(
                MessageUnreadable("A text message is not UTF-8.", remedy="Send JSON in UTF-8.")
            )
        else:
            self._connection.receive(text)


def websocket_protocol(streams: Streams) -> type[asyncio.BufferedProtocol]:
    """What uvicorn is given as `ws`: it makes one of these for each connection that is to be upgraded."""

    class WebSocket(WSProtocol):  # type: ignore[misc]
        def __init__(self, config: Any, server_state: Any, app_state: Any) -> None:
            super().__init__(
                None,
                None,
                False,
                lambda request: _routed(request, streams),
                log,
                True,
                HANDSHAKE_SECONDS,
                True,
                PING_AFTER_SECONDS,
                PONG_WITHIN_SECONDS,
                WSAutoPingStrategy.PING_WHEN_IDLE,
                True,
                streams.max_frame_bytes,
                None,
                READ_BUFFER_BYTES,
            )
            self._connections: set[Any] = server_state.connections

        def connection_made(self, transport: Any) -> None:
            self._connections.add(self)
            super().connection_made(_SocketOptions(transport))

        def connection_lost(self, error: Exception | None) -> None:
            self._connections.discard(self)
            super().connection_lost(error)

        def data_received(self, data: bytes) -> None:
            """The request, as uvicorn read it; what follows goes into the buffer by itself."""
            while data:  # a long one does not fit at once
                buffer = self.get_buffer(-1)
                part, data = data[: len(buffer)], data[len(buffer) :]
                buffer[: len(part)] = part
                self.buffer_updated(len(part))

        def shutdown(self) -> None:
            """uvicorn stops; streams have been drained before."""
            if not self.transport.is_close_frame_sent:
                self.transport.send_close(cast(WSCloseCode, GOING_AWAY), b"the service stopped")
            self.transport.disconnect()

    return cast(type[asyncio.BufferedProtocol], WebSocket)


class _SocketOptions:
    """A transport whose socket takes TCP's options even where it is a Unix one: picows sets them on all."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._socket = transport.get_extra_info("socket")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else self._transport.get_extra_info(name, default)

    def fileno(self) -> int:
        return int(self._socket.fileno())

    def setsockopt(self, *option: Any) -> None:
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(*option)

    def getsockopt(self, *option: Any) -> Any:
        return 0 if self._socket.family == socket.AF_UNIX else self._socket.getsockopt(*option)


def _routed(request: WSUpgradeRequest, streams: Streams) -> WSListener | WSUpgradeResponseWithListener:
    """A listener for the one path there is. A browser's page may not ask: it could belong to anyone."""
    path = request.path.partition(b"?")[0] if isinstance(request.path, bytes) else request.path.split("?")[0]
    if path not in (PATH, PATH.encode()):
        return _refused(404, "not_found", "There is no WebSocket at this path.", f"Connect to {PATH}.")
    if "Origin" in request.headers:
        return _refused(
            403, "origin_refused", "Streams are for programs, not for pages.", "Connect without Origin."
        )
    return Listener(streams)


def _refused(status: int, code: str, message: str, remedy: str) -> WSUpgradeResponseWithListener:
    body = orjson.dumps({"code": code, "message": message, "remedy": remedy})
    headers = {"Content-Type": "application/json"}
    return WSUpgradeResponseWithListener(WSUpgradeResponse.create_error_response(status, body, headers), None)
