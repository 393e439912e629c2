"""The stream's binary messages: what the client says, packed; what the service says, read.

session.py -> frames.py -> link.py, and back. docs/stream-protocol.md has every field.

python -c "from specmoe_client.streaming import frames; print(frames.named(frames.OPEN, 1, [7]).hex())"
"""

from __future__ import annotations

import collections.abc
import json
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from specmoe_client.errors import AnswerInvalid

PROTOCOL = 1
HELLO, OPEN, CONTEXT, START, ROUTING, END, ASK, CLOSE = range(1, 9)
WELCOME, FORECAST, UNION, ERROR, GOODBYE, EXPIRED = range(128, 134)
# Flags of hello; of context, start and routing; of welcome; of error.
PER_SEQUENCE, UNION_DEMAND, AT_START, ADAPT = 1, 2, 4, 8
TOKEN_IDS, GATES = 1, 2
FATAL = 1

HEADER = struct.Struct("<BBHIHHI")  # kind, flags, count, tag, first_layer, layers, extra
_HELLO = struct.Struct("<IfHHHH")  # deadline_us, coverage, top_n, model_bytes, version_bytes, 0
_WELCOME = struct.Struct("<HHHHIIII")
_U32 = struct.Struct("<I")
_U16S, _U32S, _F32S = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<f4")

Experts = npt.NDArray[np.unsignedinteger[Any]]
Gates = npt.NDArray[np.float32]


def hello(
    model: str,
    version: str,
    *,
    flags: int,
    every: int,
    ahead: int,
    deadline_us: int,
    coverage: float,
    top_n: int,
) -> bytes:
    """The first message of a connection. 0 stands for: no deadline, no coverage, the service's own top_n."""
    names = model.encode(), version.encode()
    return b"".join(
        (
            HEADER.pack(HELLO, flags, 0, 0, every, ahead, PROTOCOL),
            _HELLO.pack(deadline_us, coverage, top_n, len(names[0]), len(names[1]), 0),
            *names,
        )
    )


def named(kind: int, tag: int, wires: collections.abc.Sequence[int]) -> bytes:
    """open, end, ask or close: sequences by their number on the wire, nothing else."""
    return HEADER.pack(kind, 0, len(wires), tag, 0, 0, 0) + _numbers(wires)


def start(tag: int, wires: collections.abc.Sequence[int], token_ids: npt.NDArray[np.int32] | None) -> bytes:
    """A token of each sequence begins; None where the model uses no ids."""
    flags, ids = (0, b"") if token_ids is None else (TOKEN_IDS, token_ids.tobytes())
    return HEADER.pack(START, flags, len(wires), tag, 0, 0, 0) + _numbers(wires) + ids


def routing(
    tag: int, wires: collections.abc.Sequence[int], first_layer: int, experts: Experts, gates: Gates | None
) -> bytes:
    """Layers from first_layer on. experts, gates: `[n, m, K]`."""
    flags, weights = (0, b"") if gates is None else (GATES, gates.tobytes())
    header = HEADER.pack(ROUTING, flags, len(wires), tag, first_layer, experts.shape[1], 0)
    return b"".join((header, _numbers(wires), weights, experts.tobytes()))


def context(
    tag: int, wire: int, token_ids: npt.NDArray[np.int32] | None, experts: Experts, gates: Gates | None
) -> bytes:
    """Finished tokens of one sequence, oldest first. experts, gates: `[T, L, K]`."""
    tokens, layers = experts.shape[:2]
    flags, ids = (0, b"") if token_ids is None else (TOKEN_IDS, token_ids.tobytes())
    weights = b""
    if gates is not None:
        flags, weights = flags | GATES, gates.tobytes()
    header = HEADER.pack(CONTEXT, flags, 1, tag, 0, layers, tokens)
    return b"".join((header, _U32.pack(wire), ids, weights, experts.tobytes()))


@dataclass(frozen=True)
class Welcome:
    """The model's shape, what it can use, and the service's limits for this connection."""

    version: int
    uses_token_ids: bool
    uses_gates: bool
    num_layers: int
    num_experts: int
    top_k: int
    max_sequences: int
    max_frame_bytes: int
    max_context_tokens: int
    idle_seconds: int

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """L, E, K."""
        return self.num_layers, self.num_experts, self.top_k

    @cached_property
    def expert(self) -> np.dtype[Any]:
        """How an expert's id is written."""
        return np.dtype("u1") if self.num_experts <= 256 else np.dtype("<u2")


class Ranking:
    """A forecast of n sequences, or their union demand, as it came; arrays are views, made when asked for.

    wires, tokens: of the sequences. first_layer: layers seen. num_layers: layers that are forecast, m.
    """

    def __init__(self, message: bytes, expert: np.dtype[Any]) -> None:
        kind, _, count, self.tag, self.first_layer, layers, self.dropped = HEADER.unpack_from(message)
        self.num_layers: int = layers
        rows = count * self.num_layers if kind == FORECAST else self.num_layers
        after = HEADER.size + 8 * count
        body = len(message) - after - _U16S.itemsize * rows
        row_bytes = rows * (_F32S.itemsize + expert.itemsize)
        if not (count and rows and body > 0) or body % row_bytes:
            raise invalid(f"a ranking of {count} sequences, {layers} layers in {len(message)} bytes")
        width = body // row_bytes
        self._message, self._expert, self._after = message, expert, after
        self._rows = (count, self.num_layers) if kind == FORECAST else (self.num_layers,)
        self._shape = (*self._rows, width)
        self._slots = rows * width
        numbers: list[int] = np.frombuffer(message, _U32S, 2 * count, HEADER.size).tolist()
        self.wires, self.tokens = numbers[:count], numbers[count:]

    @cached_property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """float32 `[n, m, w]` or `[m, w]`."""
        return np.frombuffer(self._message, _F32S, self._slots, self._after).reshape(self._shape)

    @cached_property
    def sizes(self) -> npt.NDArray[np.uint16]:
        """uint16 `[n, m]` or `[m]`."""
        offset = self._after + 4 * self._slots
        return np.frombuffer(self._message, _U16S, math.prod(self._rows), offset).reshape(self._rows)

    @cached_property
    def experts(self) -> Experts:
        """uint8 or uint16 `[n, m, w]` or `[m, w]`."""
        offset = self._after + 4 * self._slots + self.sizes.nbytes
        return np.frombuffer(self._message, self._expert, self._slots, offset).reshape(self._shape)


def read_welcome(message: bytes) -> Welcome:
    """Raises AnswerInvalid where it is another message or speaks another protocol."""
    _, flags, _, _, _, _, version = _header(message, WELCOME, HEADER.size + _WELCOME.size)
    layers, experts, top_k, protocol, *limits = _WELCOME.unpack_from(message, HEADER.size)
    if protocol != PROTOCOL or not (layers and 0 < top_k <= experts):
        raise invalid(f"welcome of protocol {protocol}, {layers} layers, {experts} experts, top {top_k}")
    return Welcome(version, bool(flags & TOKEN_IDS), bool(flags & GATES), layers, experts, top_k, *limits)


def read_error(message: bytes) -> tuple[int, bool, dict[str, str]]:
    """(tag, whether the connection ends, the service's words)."""
    _, flags, _, tag, _, _, length = HEADER.unpack_from(message)
    try:
        words = json.loads(message[HEADER.size : HEADER.size + length])
        return tag, bool(flags & FATAL), {name: str(words[name]) for name in ("code", "message", "remedy")}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise invalid(f"an error has no code, message and remedy ({type(error).__name__})") from error


def read_expired(message: bytes) -> list[int]:
    """The sequences that were forgotten."""
    count = HEADER.unpack_from(message)[2]
    _header(message, EXPIRED, HEADER.size + 4 * count)
    wires: list[int] = np.frombuffer(message, _U32S, count, HEADER.size).tolist()
    return wires


def read_goodbye(message: bytes) -> int:
    """The milliseconds that are left."""
    return int(_header(message, GOODBYE, HEADER.size)[6])


def kind_of(message: bytes) -> int:
    """Raises AnswerInvalid where the message is shorter than a header."""
    if len(message) < HEADER.size:
        raise invalid(f"a message has {len(message)} bytes")
    return message[0]


def invalid(what: str) -> AnswerInvalid:
    """The error for a message that no specMoE service of this version sends."""
    return AnswerInvalid(
        f"The stream said something else than the protocol allows: {what}.",
        remedy="Check that base_url leads to specMoE itself and that its version fits this client's.",
    )


def _header(message: bytes, kind: int, length: int) -> tuple[int, ...]:
    if kind_of(message) != kind or len(message) != length:
        raise invalid(f"kind {message[0]} of {len(message)} bytes, expected {kind} of {length}")
    return HEADER.unpack_from(message)


def _numbers(wires: collections.abc.Sequence[int]) -> bytes:
    # For one sequence, the usual case, twice as fast as the general way.
    return _U32.pack(wires[0]) if len(wires) == 1 else struct.pack(f"<{len(wires)}I", *wires)
