"""Messages as little-endian frames: a header of 16 bytes, then arrays that numpy reads in place.

bytes -> `decode` -> messages; messages -> `Binary` -> bytes

.venv/bin/python -m pytest tests/service/stream/test_binary.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import orjson

from service.errors import MessageUnreadable
from service.schemas import MAX_VERSION
from service.stream.messages import (
    PROTOCOL,
    Context,
    Hello,
    Kind,
    Message,
    Named,
    Ranking,
    Routing,
    Start,
    Welcome,
)
from traces.spec import RoutingSpec

HEADER: Final = struct.Struct("<BBHIHHI")  # kind, flags, count, tag, first_layer, layers, extra
HELLO: Final = struct.Struct("<IfHHHH")  # deadline_us, coverage, top_n, model_bytes, version_bytes, zero
WELCOME: Final = struct.Struct("<HHHHIIII")
PER_SEQUENCE, UNION, AT_START, ADAPT = 1, 2, 4, 8  # flags of hello
TOKEN_IDS, GATES = 1, 2  # flags of context, start and routing
FATAL = 1  # flag of error
U16, U32, I32, F32 = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4"), np.dtype("<f4")
U8 = np.dtype("u1")
SEE = "docs/stream-protocol.md has the layout of every message."


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """How an expert's id is written."""
    return U8 if num_experts <= 256 else U16


def decode(frame: bytes, spec: RoutingSpec | None) -> Message:
    """A client's message. spec: of the model, None before hello. Raises MessageUnreadable."""
    if len(frame) < HEADER.size:
        raise _unreadable(f"A message has {len(frame)} bytes, expected a header of {HEADER.size} at least.")
    kind, flags, count, tag, first_layer, layers, extra = HEADER.unpack_from(frame)
    if kind == Kind.HELLO:
        return _hello(frame, flags, count, tag, first_layer, layers, extra)
    found = _READERS.get(kind)
    if found is None:
        raise _unreadable(f"kind is {kind}, expected {Kind.HELLO} to {Kind.CLOSE}.")
    named, read = found
    if spec is None:
        raise _unreadable(f"{named.label} came before hello.")
    if not count:
        raise _unreadable(f"{named.label} names no sequence: count is 0.")
    return read(frame, spec, named, flags, count, tag, first_layer, layers, extra)


def _hello(frame: bytes, flags: int, count: int, tag: int, every: int, ahead: int, protocol: int) -> Hello:
    if protocol != PROTOCOL:
        raise _unreadable(f"hello speaks protocol {protocol}, expected {PROTOCOL}.")
    _allow(Kind.HELLO, flags, PER_SEQUENCE | UNION | AT_START | ADAPT)
    fixed = HEADER.size + HELLO.size
    if len(frame) < fixed:
        raise _unreadable(f"hello has {len(frame)} bytes, expected {fixed} and the model's name.")
    deadline_us, coverage, top_n, model_bytes, version_bytes, zero = HELLO.unpack_from(frame, HEADER.size)
    if count or zero:
        raise _unreadable("hello has a field that must be 0 and is not: count or zero.")
    _check_length(Kind.HELLO, frame, fixed + model_bytes + version_bytes)
    try:
        model = frame[fixed : fixed + model_bytes].decode()
        version = frame[fixed + model_bytes :].decode()
    except UnicodeDecodeError:
        raise _unreadable("hello's model or version is not UTF-8.") from None
    return Hello(
        tag=tag,
        model=model,
        version=_selector(version),
        per_sequence=bool(flags & PER_SEQUENCE),
        union=bool(flags & UNION),
        top_n=top_n or None,
        # In float32 0.99 is a little more than 0.99, for which there is no table.
        coverage=None if coverage == 0 else round(coverage, 6),
        adapt=bool(flags & ADAPT),
        ahead=ahead,
        at_start=bool(flags & AT_START),
        every=every,
        deadline_us=deadline_us,
    )


def _selector(version: str) -> int | str | None:
    """A number, an alias, or None. Python refuses to read a number of thousands of digits."""
    is_number = version.isascii() and version.isdecimal() and len(version) <= len(str(MAX_VERSION))
    return int(version) if is_number else version or None


def _named(
    frame: bytes, spec: RoutingSpec, kind: Kind, flags: int, count: int, tag: int, *numbers: int
) -> Named:
    _allow(kind, flags, 0)
    _zero(kind, *numbers)
    _check_length(kind, frame, HEADER.size + 4 * count)
    return Named(kind, tag, _sequences(frame, count))


def _start(
    frame: bytes, spec: RoutingSpec, kind: Kind, flags: int, count: int, tag: int, *numbers: int
) -> Start:
    _allow(kind, flags, TOKEN_IDS)
    _zero(kind, *numbers)
    ids = flags & TOKEN_IDS
    _check_length(kind, frame, HEADER.size + (8 if ids else 4) * count)
    token_ids = _token_ids(frame, HEADER.size + 4 * count, count) if ids else np.full(count, -1, np.int64)
    return Start(tag, _sequences(frame, count), token_ids)


def _context(
    frame: bytes,
    spec: RoutingSpec,
    kind: Kind,
    flags: int,
    count: int,
    tag: int,
    first_layer: int,
    layers: int,
    tokens: int,
) -> Context:
    _allow(kind, flags, TOKEN_IDS | GATES)
    _zero(kind, first_layer)
    if count != 1 or layers != spec.num_layers or not tokens:
        raise _unreadable(
            f"context tells {count} sequences, {layers} layers, {tokens} tokens; "
            f"expected 1, {spec.num_layers}, 1 or more."
        )
    ids = 4 * tokens if flags & TOKEN_IDS else 0
    start = HEADER.size + 4
    experts, gates = _routed(frame, kind, start + ids, flags, (tokens, layers, spec.top_k), spec)
    token_ids = _token_ids(frame, start, tokens) if ids else np.full(tokens, -1, np.int64)
    return Context(tag, _sequences(frame, 1)[0], token_ids, experts, gates)


def _routing(
    frame: bytes,
    spec: RoutingSpec,
    kind: Kind,
    flags: int,
    count: int,
    tag: int,
    first_layer: int,
    layers: int,
    extra: int,
) -> Routing:
    _allow(kind, flags, GATES)
    if extra or not layers:
        raise _unreadable(f"routing tells {layers} layers with extra {extra}, expected 1 or more, and 0.")
    shape = (count, layers, spec.top_k)
    experts, gates = _routed(frame, kind, HEADER.size + 4 * count, flags, shape, spec)
    return Routing(tag, _sequences(frame, count), first_layer, experts, gates)


# Looking a Kind up by its number takes longer than looking both up here.
_READERS: dict[int, tuple[Kind, Callable[..., Message]]] = {
    Kind.OPEN.value: (Kind.OPEN, _named),
    Kind.CONTEXT.value: (Kind.CONTEXT, _context),
    Kind.START.value: (Kind.START, _start),
    Kind.ROUTING.value: (Kind.ROUTING, _routing),
    Kind.END.value: (Kind.END, _named),
    Kind.ASK.value: (Kind.ASK, _named),
    Kind.CLOSE.value: (Kind.CLOSE, _named),
}


def _routed(
    frame: bytes, kind: Kind, start: int, flags: int, shape: tuple[int, int, int], spec: RoutingSpec
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """(experts, gates) of this shape from `start` to the frame's end."""
    slots = shape[0] * shape[1] * shape[2]
    dtype = expert_dtype(spec.num_experts)
    after = start + (4 * slots if flags & GATES else 0)
    _check_length(kind, frame, after + dtype.itemsize * slots)
    gates = np.frombuffer(frame, F32, slots, start).reshape(shape) if flags & GATES else None
    return np.frombuffer(frame, dtype, slots, after).reshape(shape), gates


def _sequences(frame: bytes, count: int) -> list[int]:
    sequences: list[int] = np.frombuffer(frame, U32, count, HEADER.size).tolist()
    return sequences


def _token_ids(frame: bytes, start: int, count: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(frame, I32, count, start).astype(np.int64)


def _allow(kind: Kind, flags: int, allowed: int) -> None:
    if flags & ~allowed:
        raise _unreadable(f"{kind.label} has flags {flags}, expected bits of {allowed} only.")


def _zero(kind: Kind, *numbers: int) -> None:
    if any(numbers):
        raise _unreadable(f"{kind.label} has {numbers} behind its tag, expected 0.")


def _check_length(kind: Kind, frame: bytes, expected: int) -> None:
    if len(frame) != expected:
        raise _unreadable(f"{kind.label} has {len(frame)} bytes, expected {expected} by its header.")


def _unreadable(message: str) -> MessageUnreadable:
    return MessageUnreadable(message, remedy=SEE)


class Binary:
    """The service's messages as frames. num_experts: of the model, once it is known."""

    def __init__(self, num_experts: int = 0) -> None:
        self._expert = expert_dtype(num_experts)

    def welcome(self, welcome: Welcome) -> bytes:
        flags = welcome.uses_token_ids * TOKEN_IDS | welcome.uses_gates * GATES
        return HEADER.pack(Kind.WELCOME, flags, 0, welcome.tag, 0, 0, welcome.version) + WELCOME.pack(
            welcome.num_layers,
            welcome.num_experts,
            welcome.top_k,
            PROTOCOL,
            welcome.max_sequences,
            welcome.max_frame_bytes,
            welcome.max_context_tokens,
            welcome.idle_seconds,
        )

    def forecast(self, ranking: Ranking) -> bytes:
        return self._ranking(Kind.FORECAST, ranking)

    def union(self, ranking: Ranking) -> bytes:
        return self._ranking(Kind.UNION, ranking)

    def error(self, tag: int, code: str, message: str, remedy: str, *, fatal: bool) -> bytes:
        body = orjson.dumps({"code": code, "message": message, "remedy": remedy})
        return HEADER.pack(Kind.ERROR, FATAL if fatal else 0, 0, tag, 0, 0, len(body)) + body

    def goodbye(self, milliseconds: int) -> bytes:
        return HEADER.pack(Kind.GOODBYE, 0, 0, 0, 0, 0, milliseconds)

    def expired(self, sequences: Sequence[int]) -> bytes:
        return HEADER.pack(Kind.EXPIRED, 0, len(sequences), 0, 0, 0, 0) + np.array(sequences, U32).tobytes()

    def _ranking(self, kind: Kind, ranking: Ranking) -> bytes:
        return b"".join(
            (
                HEADER.pack(
                    kind,
                    0,
                    len(ranking.sequences),
                    ranking.tag,
                    ranking.first_layer,
                    ranking.sizes.shape[-1],
                    ranking.dropped & 0xFFFFFFFF,
                ),
                struct.pack(f"<{2 * len(ranking.sequences)}I", *ranking.sequences, *ranking.tokens),
                ranking.probabilities.astype(F32, copy=False).tobytes(),
                ranking.sizes.astype(U16, copy=False).tobytes(),
                ranking.experts.astype(self._expert).tobytes(),
            )
        )
