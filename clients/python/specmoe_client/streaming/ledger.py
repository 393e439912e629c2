"""What the connection knows of each sequence, and the messages that bring it up to date.

session.py -> ledger.py -> tracks.py, frames.py

Numbers on the wire are never used twice: what is said of an earlier opening of a sequence cannot be mistaken
for something about a later one.
"""

from __future__ import annotations

import collections.abc
import itertools
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specmoe_client.streaming import frames
from specmoe_client.streaming.frames import Experts, Gates, Ranking, Welcome
from specmoe_client.streaming.options import StreamOptions
from specmoe_client.streaming.tracks import ADRIFT, IDLE, Finished, Rows, Track, past_messages

# Messages whose refusal can be traced to their sequences: more than are under way at any time.
TRACED = 256
# A sequence that the service refused to go on with is opened again, but not at once: the service may be full.
REOPEN_AFTER_S = 1.0
MAX_TAG = 0xFFFFFFFF


@dataclass(frozen=True)
class Past:
    """What a new connection is told of a sequence before it is handed over."""

    handle: int
    wire: int
    finished: int
    tokens: collections.abc.Sequence[Finished]


def opening(past: Past, welcome: Welcome) -> list[bytes]:
    """Messages that open a sequence with its past."""
    return [
        frames.named(frames.OPEN, 0, [past.wire]),
        *past_messages(0, past.wire, past.tokens, welcome),
    ]


class Ledger:
    """Of one stream, over all of its connections. union_tag: of the message that made a union due last."""

    def __init__(self, options: StreamOptions) -> None:
        self.attached = False
        self.union_tag = 0
        self.welcome: Welcome
        self.rows: Rows
        self._options = options
        self._by_wire: dict[int, Track] = {}
        self._abandoned: list[int] = []
        self._wires, self._tags = itertools.count(), itertools.count(1)
        self._traced: dict[int, tuple[int, int, list[int]]] = {}

    def start(self, tracks: list[Track], token_ids: npt.NDArray[np.int32]) -> bytes:
        """The message that begins a token of tracks in step."""
        for track in tracks:
            track.wire_started += 1
        tag, wires = self._tag(frames.START, tracks)
        self._note_union(tag, 0, 0)
        return frames.start(tag, wires, token_ids if self.welcome.uses_token_ids else None)

    def routing(self, tracks: list[Track], first: int, experts: Experts, gates: Gates | None) -> bytes:
        """The message that tells layers of tracks in step: `[n, m, K]`."""
        tag, wires = self._tag(frames.ROUTING, tracks)
        self._note_union(tag, first, first + experts.shape[1])
        return frames.routing(tag, wires, first, experts, gates)

    def ask(self, tracks: list[Track]) -> bytes:
        """The message that asks for forecasts of tracks in step."""
        tag, wires = self._tag(frames.ASK, tracks)
        self.union_tag = tag
        return frames.named(frames.ASK, tag, wires)

    def end(self, tracks: list[Track]) -> bytes:
        """The message that ends the tokens in progress of tracks in step."""
        return frames.named(frames.END, *self._tag(frames.END, tracks))

    def catch_up(self, tracks: collections.abc.Iterable[Track]) -> list[bytes]:
        """All that the connection misses of these tracks."""
        if not self.attached:
            return []
        closing = self._close(self._abandoned)
        self._abandoned = []
        return closing + [
            message for track in tracks if not track.in_step for message in self._missing(track)
        ]

    def forget(self, tracks: collections.abc.Iterable[Track]) -> list[bytes]:
        """The program closes these tracks."""
        wires = [track.wire for track in tracks if track.wire is not None]
        for wire in wires:
            del self._by_wire[wire]
        return self._close(wires)

    def take_forecast(self, ranking: Ranking) -> None:
        """Give a forecast to the tracks whose token in progress it is of."""
        for position, (wire, token) in enumerate(zip(ranking.wires, ranking.tokens, strict=True)):
            track = self._by_wire.get(wire)
            if track is not None and track.wire_started - 1 == token:
                track.newest = ranking, position

    def sharing(self, union: Ranking) -> tuple[int, ...] | None:
        """The sequences of a union; None where one has left the token that it is of."""
        tracks = [self._by_wire.get(wire) for wire in union.wires]
        handles = tuple(
            track.handle
            for track, token in zip(tracks, union.tokens, strict=True)
            if track is not None and track.seen >= 0 and track.wire_started - 1 == token
        )
        return handles if len(handles) == len(tracks) else None

    def union_tracks(self) -> list[Track]:
        """Those of which a union was due last, as far as they are within a token."""
        tag, _, wires = self._traced.get(self.union_tag % TRACED, (0, 0, []))
        tracks = [self._by_wire.get(wire) for wire in wires] if tag == self.union_tag else []
        return [track for track in tracks if track is not None and track.seen >= 0]

    def refused(self, tag: int) -> None:
        """The service applied nothing of the message with this tag: its tracks are not known as they are."""
        traced, kind, wires = self._traced.get(tag % TRACED, (0, 0, []))
        if traced == tag:
            if kind != frames.OPEN:
                self._abandoned += [wire for wire in wires if wire in self._by_wire]
            self._lose(wires, time.monotonic() + REOPEN_AFTER_S)

    def expired(self, wires: collections.abc.Iterable[int]) -> None:
        """The service has forgotten these: they are opened again when they are used."""
        self._lose(wires, 0.0)

    def pasts(self, tracks: collections.abc.Iterable[Track]) -> list[Past]:
        """What to tell a new connection. More may be told meanwhile: `attach` makes up for it."""
        return [
            Past(track.handle, next(self._wires), track.finished, tuple(track.history)) for track in tracks
        ]

    def attach(self, pasts: collections.abc.Sequence[Past], tracks: dict[int, Track]) -> list[bytes]:
        """The connection that was told the pasts is the stream's. Gives what it misses."""
        self.attached = True
        closing = self._close([past.wire for past in pasts if past.handle not in tracks])
        for past in pasts:
            track = tracks.get(past.handle)
            if track is not None:
                track.wire, track.told, track.wire_started = past.wire, past.finished, 0
                track.in_step = track.seen == IDLE and track.finished == track.told
                self._by_wire[past.wire] = track
        return closing + self.catch_up(track for track in tracks.values() if track.seen >= 0)

    def detach(self, tracks: collections.abc.Iterable[Track]) -> None:
        """The connection is gone."""
        self.attached = False
        self._by_wire.clear()
        self._traced.clear()
        self._abandoned, self.union_tag = [], 0
        for track in tracks:
            track.lose()
            track.hold_until_s = 0.0

    def _close(self, wires: list[int]) -> list[bytes]:
        return [frames.named(frames.CLOSE, self._tag(frames.CLOSE, ())[0], wires)] if wires else []

    def _missing(self, track: Track) -> collections.abc.Iterator[bytes]:
        if track.hold_until_s > time.monotonic():
            return
        if track.wire is None:
            track.wire = next(self._wires)
            self._by_wire[track.wire] = track
            yield frames.named(frames.OPEN, *self._tag(frames.OPEN, [track]))
        untold = track.untold()
        if untold:
            tag, (wire,) = self._tag(frames.CONTEXT, [track])
            yield from past_messages(tag, wire, untold, self.welcome)
        track.told, track.in_step = track.finished, track.seen != ADRIFT
        if track.seen >= 0:
            yield from self._token_in_progress(track)

    def _token_in_progress(self, track: Track) -> collections.abc.Iterator[bytes]:
        yield self.start([track], np.array([track.token_id], "<i4"))
        if track.seen:
            row = slice(track.row, track.row + 1), slice(0, track.seen)
            gates = self.rows.gates[row] if track.gated and self.welcome.uses_gates else None
            yield self.routing([track], 0, self.rows.experts[row], gates)
        if track.due >= 0 and not self._made_due(0, track.seen):
            # It was asked for, or was due at a layer that is told together with others now.
            yield self.ask([track])

    def _tag(self, kind: int, tracks: collections.abc.Iterable[Track]) -> tuple[int, list[int]]:
        """(tag, numbers on the wire) of a message, remembered in case it is refused."""
        tag = next(self._tags) & MAX_TAG
        wires = [track.wire for track in tracks if track.wire is not None]
        self._traced[tag % TRACED] = tag, kind, wires
        return tag, wires

    def _made_due(self, first: int, end: int) -> bool:
        """Whether the service forecasts by itself after layers first .. end - 1, or a start."""
        if end == self.welcome.num_layers:
            return False
        return self._options.at_start if end == 0 else self._options.due(first, end)

    def _note_union(self, tag: int, first: int, end: int) -> None:
        if self._made_due(first, end):
            self.union_tag = tag

    def _lose(self, wires: collections.abc.Iterable[int], hold_until_s: float) -> None:
        for wire in wires:
            track = self._by_wire.pop(wire, None)
            if track is not None:
                track.lose()
                track.hold_until_s = hold_until_s
