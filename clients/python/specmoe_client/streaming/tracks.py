"""What is kept of each sequence: its past, its token in progress, and how much of both the service was told.

session.py -> tracks.py -> frames.py: what must be told again after a connection was lost

A track is *in step* while the connection knows all of it. Out of step, the connection knows `told` finished
tokens of it at most, and no token in progress: all that is missing can be sent in one go, at any time.
"""

from __future__ import annotations

import collections.abc
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from specmoe_client.questions import Token
from specmoe_client.streaming import frames
from specmoe_client.streaming.frames import Experts, Gates, Ranking, Welcome

# `Track.seen` between two tokens, and within a token whose layers are not known.
IDLE, ADRIFT = -1, -2
FIRST_ROWS = 16

# Token id, experts [L, K], gates [L, K] or None. Never changed: a copy of the list of them is a snapshot.
Finished = tuple[int, Experts, Gates | None]


@dataclass(eq=False, slots=True)
class Track:
    """What is known of one sequence.

    handle: the program's name for it; wire: the connection's, None where it is not open. row: in `Rows`.
    seen: layers told of the token in progress, or IDLE, or ADRIFT.
    due: layers that the newest forecast which was made due has seen; -1 where none was in this token.
    gated: whether the token in progress has gates.
    started, wire_started: tokens, on the stream and on the wire.
    finished: tokens so far. told: those of them that the connection knows, while the track is out of step.
    context: tokens before the first, while the model's shape is not known yet.
    newest: the newest forecast of this token, and the sequence's place in it.
    hold_until_s: not to be opened again before.
    """

    handle: int
    row: int
    history: deque[Finished]
    context: collections.abc.Sequence[Token] = ()
    wire: int | None = None
    in_step: bool = False
    token_id: int = -1
    seen: int = IDLE
    gated: bool = False
    due: int = -1
    started: int = 0
    wire_started: int = 0
    finished: int = 0
    told: int = 0
    newest: tuple[Ranking, int] | None = None
    hold_until_s: float = 0.0

    def begin(self, token_id: int, seen: int, due: int) -> None:
        """A token starts."""
        self.token_id, self.seen, self.due = token_id, seen, due
        self.gated, self.newest = False, None
        self.started += 1

    def finish(self, experts: Experts, gates: Gates | None) -> None:
        """The token in progress is complete."""
        self.history.append((self.token_id, experts, gates))
        self.finished += 1
        self.seen = IDLE

    def lose(self) -> None:
        """The connection knows nothing of it any longer."""
        self.wire, self.in_step, self.told, self.wire_started = None, False, 0, 0

    def untold(self) -> list[Finished]:
        """Finished tokens that the connection does not know, as far as they are kept."""
        missing = min(self.finished - self.told, len(self.history))
        return list(self.history)[len(self.history) - missing :] if missing else []


@dataclass(eq=False)
class Rows:
    """Tokens in progress of all tracks, one row each, so that a batch is written at once.

    experts: `[rows, L, K]`; gates: the same shape, 1 where they were not told.
    """

    shape: tuple[int, int]
    expert: np.dtype[np.unsignedinteger]
    experts: Experts = field(init=False)
    gates: Gates = field(init=False)

    def __post_init__(self) -> None:
        self.experts = np.zeros((FIRST_ROWS, *self.shape), self.expert)
        self.gates = np.ones((FIRST_ROWS, *self.shape), "<f4")

    def write(self, rows: list[int], first: int, experts: Experts, gates: Gates | None) -> None:
        """Layers from `first` on: `[n, m, K]`."""
        if max(rows) >= len(self.experts):
            self._grow(max(rows) + 1)
        layers = slice(first, first + experts.shape[1])
        # One row, the usual case, costs a third this way.
        place = rows[0] if len(rows) == 1 else np.array(rows)
        self.experts[place, layers] = experts
        self.gates[place, layers] = 1.0 if gates is None else gates

    def read(self, row: int, gated: bool) -> tuple[Experts, Gates | None]:
        """All layers `[L, K]` of a row, as they are now."""
        return self.experts[row].copy(), self.gates[row].copy() if gated else None

    def _grow(self, rows: int) -> None:
        more = max(rows, 2 * len(self.experts)) - len(self.experts)
        self.experts = np.concatenate([self.experts, np.zeros((more, *self.shape), self.expert)])
        self.gates = np.concatenate([self.gates, np.ones((more, *self.shape), "<f4")])


def past_messages(
    tag: int, wire: int, past: collections.abc.Sequence[Finished], shape: Welcome
) -> list[bytes]:
    """`context` messages that tell finished tokens, the last that the service takes in."""
    past = past[-shape.max_context_tokens :]
    token_bytes = 4 + shape.num_layers * shape.top_k * (4 + shape.expert.itemsize)
    most = max(1, (shape.max_frame_bytes - frames.HEADER.size - 4) // token_bytes)
    return [_context(tag, wire, past[first : first + most], shape) for first in range(0, len(past), most)]


def _context(tag: int, wire: int, past: collections.abc.Sequence[Finished], shape: Welcome) -> bytes:
    token_ids, experts, gates = zip(*past, strict=True)
    ids = np.array(token_ids, "<i4") if shape.uses_token_ids else None
    weights = None
    if shape.uses_gates and any(of_token is not None for of_token in gates):
        ones = np.ones(experts[0].shape, "<f4")
        weights = np.stack([ones if of_token is None else of_token for of_token in gates])
    return frames.context(tag, wire, ids, np.stack(experts), weights)
