"""What travels over a stream, whatever its encoding. docs/stream-protocol.md is the specification.

binary.py, text.py -> messages -> connection.py

Those that come and go with every layer are not frozen: making one would take twice as long.

.venv/bin/python -m pytest tests/service/stream
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int64, Integer

PROTOCOL = 1
# Sequences in a message: its count is a u16.
MAX_COUNT = 65535


class Kind(IntEnum):
    """Kinds of messages; the first bit tells who sends them. A name in lower case is the JSON `type`."""

    HELLO = 1
    OPEN = 2
    CONTEXT = 3
    START = 4
    ROUTING = 5
    END = 6
    ASK = 7
    CLOSE = 8
    WELCOME = 128
    FORECAST = 129
    UNION = 130
    ERROR = 131
    GOODBYE = 132
    EXPIRED = 133

    @property
    def label(self) -> str:
        """As people write it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Hello:
    """What a connection is for. ahead, every: layers, 0: all, none. deadline_us: 0: none.

    top_n, coverage: None where not given; at most one of them is. adapt: coverage learns from its misses.
    """

    tag: int
    model: str
    version: int | str | None = None
    per_sequence: bool = True
    union: bool = False
    top_n: int | None = None
    coverage: float | None = None
    adapt: bool = False
    ahead: int = 0
    at_start: bool = True
    every: int = 1
    deadline_us: int = 0


@dataclass(slots=True)
class Named:
    """open, end, ask or close: nothing but sequences."""

    kind: Kind
    tag: int
    sequences: list[int]


@dataclass(frozen=True, slots=True)
class Context:
    """T finished tokens of a sequence, oldest first. token_ids: -1 where unknown."""

    tag: int
    sequence: int
    token_ids: Int64[np.ndarray, "T"]
    experts: Integer[np.ndarray, "T L K"]
    gates: Float32[np.ndarray, "T L K"] | None


@dataclass(slots=True)
class Start:
    """A token of each of these sequences begins. token_ids: -1 where unknown."""

    tag: int
    sequences: list[int]
    token_ids: Int64[np.ndarray, "n"]


@dataclass(slots=True)
class Routing:
    """What the next m layers were routed to."""

    tag: int
    sequences: list[int]
    first_layer: int
    experts: Integer[np.ndarray, "n m K"]
    gates: Float32[np.ndarray, "n m K"] | None


Message = Hello | Named | Context | Start | Routing


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to hello."""

    tag: int
    model: str
    version: int
    num_layers: int
    num_experts: int
    top_k: int
    uses_token_ids: bool
    uses_gates: bool
    max_sequences: int
    max_frame_bytes: int
    max_context_tokens: int
    idle_seconds: int


@dataclass(slots=True)
class Ranking:
    """Ranked experts of m layers from first_layer on, for n sequences, or for all of them together.

    experts, probabilities: [n, m, w], of a union [m, w]. sizes: how many of the w are meant, [n, m], of a
    union [m].
    """

    tag: int
    first_layer: int
    dropped: int
    sequences: Sequence[int]
    tokens: Sequence[int]
    experts: np.ndarray[Any, Any]
    probabilities: np.ndarray[Any, Any]
    sizes: Integer[np.ndarray, "*n m"]


class Encoding(Protocol):
    """Turns what the service says into what is sent: bytes for binary messages, str for text."""

    def welcome(self, welcome: Welcome) -> bytes | str: ...

    def forecast(self, ranking: Ranking) -> bytes | str: ...

    def union(self, ranking: Ranking) -> bytes | str: ...

    def error(self, tag: int, code: str, message: str, remedy: str, *, fatal: bool) -> bytes | str: ...

    def goodbye(self, milliseconds: int) -> bytes | str: ...

    def expired(self, sequences: Sequence[int]) -> bytes | str: ...
