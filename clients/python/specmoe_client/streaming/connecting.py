"""From an address to a stream that was welcomed; and what to call it when that fails, or ends.

keeper.py -> connecting.py -> link.py
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import NoReturn

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidMessage, InvalidStatus, InvalidURI
from websockets.http11 import Response
from websockets.protocol import Event
from websockets.uri import WebSocketURI, parse_uri

from specmoe_client.errors import (
    AnswerInvalid,
    ClientError,
    NotFound,
    RequestInvalid,
    ServiceUnavailable,
    ServiceUnreachable,
)
from specmoe_client.exchange import MAX_ANSWER_BYTES, refusal
from specmoe_client.streaming import frames
from specmoe_client.streaming.frames import Welcome
from specmoe_client.streaming.link import ABNORMAL, INVALID, Link, Lost

PATH = "/v1/stream"
# For all of it: a version may have to be loaded before the welcome.
CONNECT_SECONDS = 10.0
# Close codes that say the program asked for something wrong. All others may be better next time.
FINAL = {4400: RequestInvalid, 4404: NotFound}
# A close code of the protocol is an HTTP status and this.
STATUS = 4000


@dataclass(frozen=True)
class Opened:
    """A connection that was welcomed. messages: what came with the welcome."""

    link: Link
    welcome: Welcome
    messages: list[bytes]


class Endpoint:
    """Where the stream is. Raises ClientError where base_url is no http:// URL."""

    def __init__(self, base_url: str, uds: str | None) -> None:
        scheme, _, rest = base_url.partition("://")
        try:
            self._uri = parse_uri(f"ws://{rest.rstrip('/')}{PATH}")
        except InvalidURI as error:
            raise _no_url(base_url) from error
        if scheme != "http":
            raise _no_url(base_url)
        self._uds = uds

    def open(self, hello: bytes) -> Opened:
        """Connect and be welcomed. Raises NoPrediction, or RequestRefused where it will never be."""
        end_s = time.monotonic() + CONNECT_SECONDS
        try:
            connection = self._connect()
        except OSError as error:
            raise unreachable(f"{type(error).__name__}: {error}") from error
        try:
            return _greet(_shake_hands(connection, self._uri), hello, end_s)
        except OSError as error:
            connection.close()
            raise unreachable(f"{type(error).__name__}: {error}") from error
        except BaseException:
            connection.close()
            raise

    def _connect(self) -> socket.socket:
        if self._uds is None:
            connection = socket.create_connection((self._uri.host, self._uri.port), CONNECT_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(self._uds)
        except OSError:
            connection.close()
            raise
        return connection


def ended(lost: Lost, words: dict[str, str]) -> ClientError:
    """The error for a stream that ended. words: of the `error` before the end, if one came."""
    if lost.code == ABNORMAL:
        return unreachable(lost.reason)
    if lost.code == INVALID:
        return frames.invalid(lost.reason)
    message = words.get("message") or f"The service closed the stream: {lost.reason or 'it gave no reason'}."
    remedy = words.get("remedy") or f"docs/stream-protocol.md tells what close code {lost.code} means."
    status = lost.code - STATUS if lost.code >= STATUS else 503
    return FINAL.get(lost.code, ServiceUnavailable)(
        f"{message} (close code {lost.code})",
        remedy=remedy,
        status=status,
        code=words.get("code", f"close_{lost.code}"),
        request_id="",
    )


def unreachable(reason: str) -> ServiceUnreachable:
    """The error for a connection that could not be made, or broke."""
    return ServiceUnreachable(
        f"There is no stream ({reason}).",
        remedy="Check that the service runs (/livez) and that base_url or uds leads to it.",
    )


def _shake_hands(connection: socket.socket, uri: WebSocketURI) -> Link:
    # Forecasts do not compress well, and soon enough not at all: no extensions.
    protocol = ClientProtocol(uri, max_size=MAX_ANSWER_BYTES)
    request = protocol.connect()
    request.headers["User-Agent"] = "specmoe-client"
    protocol.send_request(request)
    connection.sendall(b"".join(protocol.data_to_send()))
    events: list[Event] = []
    while not events and protocol.handshake_exc is None:
        data = connection.recv(1 << 16)
        if data:
            protocol.receive_data(data)
        else:
            protocol.receive_eof()
        events = protocol.events_received()
    if protocol.handshake_exc is not None:
        _not_upgraded(protocol.handshake_exc, events)
    return Link(connection, protocol, events[1:])


def _not_upgraded(error: Exception, events: list[Event]) -> NoReturn:
    if isinstance(error, InvalidMessage):
        raise unreachable(f"what answers speaks no HTTP: {error}") from error
    answers = [event for event in events if isinstance(event, Response)]
    if not isinstance(error, InvalidStatus) or not answers:
        raise AnswerInvalid(
            f"The service did not upgrade to a WebSocket ({error}).",
            remedy="Check that base_url leads to specMoE, and that proxies between let WebSockets through.",
        ) from error
    try:
        document = json.loads(answers[0].body or b"")
    except (ValueError, RecursionError):
        document = None
    raise refusal(answers[0].status_code, document) from error


def _greet(link: Link, hello: bytes, end_s: float) -> Opened:
    link.send([hello])
    messages = link.receive()
    while not messages and link.lost is None:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise unreachable(f"no welcome within {CONNECT_SECONDS:g} s")
        link.wait(left_s)
        messages = link.receive()
    if messages and frames.kind_of(messages[0]) == frames.WELCOME:
        return Opened(link, frames.read_welcome(messages[0]), messages[1:])
    words: dict[str, str] = {}
    if messages and frames.kind_of(messages[0]) == frames.ERROR:
        words = frames.read_error(messages[0])[2]
        while link.lost is None and time.monotonic() < end_s:
            link.wait(end_s - time.monotonic())
            link.receive()
    raise ended(link.lost, words) if link.lost else frames.invalid("something else than a welcome")


def _no_url(base_url: str) -> ClientError:
    return ClientError(
        f"base_url is {base_url!r}, expected http://host:port.",
        remedy="Streams speak plain HTTP: where TLS is wanted, put it between, as a local proxy does.",
    )
