"""The bytes of a stream as a client sends and reads them, by docs/stream-protocol.md and nothing else.

Not `specmoe_client` and not the service's own code: a load must cost less than what it measures, and a second
reading of the page finds what the first one took for granted.

    specmoe bench --only stream
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64

HEADER = struct.Struct("<BBHIHHI")
HELLO_BODY = struct.Struct("<IfHHHH")
HELLO, OPEN, START, ROUTING = 1, 2, 4, 5
WELCOME, FORECAST, ERROR = 128, 129, 131
PER_SEQUENCE, AT_START, TOKEN_IDS, GATES = 1, 4, 1, 2
PROTOCOL = 1
# Above so many experts, an expert takes two bytes.
MAX_BYTE_EXPERTS = 256

FINAL_BINARY, CLOSE, MASKED = 0x82, 0x88, 0x80
# Any mask: every client must send one, and no proxy between here and there can be harmed.
MASK = b"\x37\xfa\x21\x3d"
UPGRADE = (
    b"GET /v1/stream HTTP/1.1\r\nHost: service\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@dataclass(frozen=True)
class Answer:
    """The header of a message from the service, and the message itself."""

    kind: int
    count: int
    first_layer: int
    message: bytes


def hello(model: str, version: int, *, top_n: int = 0) -> bytes:
    """Forecasts for each sequence, at token start and after every layer."""
    names = model.encode(), str(version).encode()
    body = HELLO_BODY.pack(0, 0.0, top_n, len(names[0]), len(names[1]), 0)
    head = HEADER.pack(HELLO, PER_SEQUENCE | AT_START, 0, 0, 1, 0, PROTOCOL)
    return head + body + b"".join(names)


def open_sequences(sequences: Sequence[int]) -> bytes:
    """Make them known."""
    return HEADER.pack(OPEN, 0, len(sequences), 0, 0, 0, 0) + _numbers(sequences)


def start(sequences: Sequence[int], token_ids: Int64[np.ndarray, "B"]) -> bytes:
    """A token begins on each of them."""
    head = HEADER.pack(START, TOKEN_IDS, len(sequences), 0, 0, 0, 0)
    return head + _numbers(sequences) + token_ids.astype("<i4").tobytes()


def routing(
    sequences: Sequence[int],
    first_layer: int,
    experts: Int32[np.ndarray, "B M K"],
    gates: Float32[np.ndarray, "B M K"],
    num_experts: int,
) -> bytes:
    """M layers of each of them, gates told."""
    head = HEADER.pack(ROUTING, GATES, len(sequences), 0, first_layer, experts.shape[1], 0)
    ids = experts.astype("u1" if num_experts <= MAX_BYTE_EXPERTS else "<u2")
    return head + _numbers(sequences) + gates.astype("<f4").tobytes() + ids.tobytes()


def masked(message: bytes) -> bytes:
    """The message as the WebSocket frame of a client."""
    size = len(message)
    if size < 126:
        head = struct.pack("!BB", FINAL_BINARY, MASKED | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", FINAL_BINARY, MASKED | 126, size)
    else:
        head = struct.pack("!BBQ", FINAL_BINARY, MASKED | 127, size)
    key = np.frombuffer((MASK * (size // 4 + 1))[:size], np.uint8)
    return head + MASK + (np.frombuffer(message, np.uint8) ^ key).tobytes()


def answers(received: bytearray) -> Iterator[Answer]:
    """The whole messages that what was received begins with; they are taken off it. Pings are passed over."""
    while len(received) >= 2:
        size, begin = received[1], 2
        if size >= 126:
            begin = 4 if size == 126 else 10
            size = int.from_bytes(received[2:begin], "big")
        if len(received) < begin + size:
            return
        opcode, message = received[0], bytes(received[begin : begin + size])
        del received[: begin + size]
        if opcode == FINAL_BINARY:
            kind, _, count, _, first_layer, _, _ = HEADER.unpack_from(message)
            yield Answer(kind, count, first_layer, message[HEADER.size :])
        elif opcode == CLOSE:
            yield Answer(ERROR, 0, 0, message[2:])


def _numbers(sequences: Sequence[int]) -> bytes:
    return np.asarray(sequences, "<u4").tobytes()
