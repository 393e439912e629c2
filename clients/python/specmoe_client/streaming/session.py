"""The conversation without sockets, threads or waiting: what was told, what must be sent, what is foretold.

Stream.route -> Session.route -> bytes to send; bytes that came -> Session.receive -> Session.latest

What is told is kept, as far as a new connection needs it to be brought to the same point.
"""

from __future__ import annotations

import collections.abc
import itertools
from collections import deque

import numpy.typing as npt

from specmoe_client.errors import MessageRefused, RequestInvalid
from specmoe_client.questions import Token
from specmoe_client.streaming import frames, routing
from specmoe_client.streaming.forecasts import SequenceForecast, UnionForecast
from specmoe_client.streaming.frames import Experts, Gates, Ranking, Welcome
from specmoe_client.streaming.ledger import Ledger, Past
from specmoe_client.streaming.options import StreamOptions
from specmoe_client.streaming.routing import wrong
from specmoe_client.streaming.tracks import ADRIFT, IDLE, Finished, Rows, Track

Handles = collections.abc.Sequence[int]


class Session:
    """Sequences of one stream. What tells something gives the messages to send: none without a connection.

    history: finished tokens that are kept of a sequence. on_refused: hears of what the service refused.
    """

    def __init__(
        self,
        options: StreamOptions,
        history: int,
        on_refused: collections.abc.Callable[[MessageRefused], None],
    ) -> None:
        self.welcome: Welcome | None = None
        self.dropped = 0
        self.milliseconds_left: int | None = None
        self.last_words: dict[str, str] = {}
        self._options, self._history, self._on_refused = options, history, on_refused
        self._ledger = Ledger(options)
        self._rows: Rows
        self._tracks: dict[int, Track] = {}
        self._free_rows: list[int] = []
        self._handles = itertools.count()
        self._union: Ranking | None = None

    def open(self, context: collections.abc.Sequence[Token]) -> tuple[int, list[bytes]]:
        """(handle, messages). Raises RequestInvalid where a token of the context is none of the model."""
        past: deque[Finished] = deque(maxlen=self._history)
        if self.welcome is not None:
            past.extend([routing.checked_token(token, self.welcome) for token in context])
        row = self._free_rows.pop() if self._free_rows else len(self._tracks)
        track = Track(next(self._handles), row, past, finished=len(past))
        track.context = () if self.welcome else tuple(context)
        self._tracks[track.handle] = track
        return track.handle, self._ledger.catch_up([track])

    def start(self, handles: Handles, token_ids: npt.ArrayLike | None) -> list[bytes]:
        """A token of each sequence begins. Raises RequestInvalid."""
        tracks = self._find(handles)
        for track in tracks:
            if track.seen >= 0:
                raise wrong(
                    f"Sequence {track.handle} is within a token: {track.seen} of its layers were told.",
                    "Tell its remaining layers, or end it.",
                )
        ids = routing.checked_token_ids(token_ids, len(tracks))
        due = 0 if self._options.at_start else -1
        for track, token_id in zip(tracks, ids.tolist(), strict=True):
            track.begin(token_id, ADRIFT if self.welcome is None else 0, due)
        if _in_step(tracks):
            return [self._ledger.start(tracks, ids)]
        told = [position for position, track in enumerate(tracks) if track.in_step]
        messages = [self._ledger.start([tracks[position] for position in told], ids[told])] if told else []
        return messages + self._ledger.catch_up(tracks)

    def route(self, handles: Handles, experts: npt.ArrayLike, gates: npt.ArrayLike | None) -> list[bytes]:
        """The next layer, or layers, of each sequence. Raises RequestInvalid."""
        tracks = self._find(handles)
        first = _next_layer(tracks)
        if self.welcome is None:
            routing.as_layers(experts, len(tracks))
            return []
        told = routing.checked_experts(experts, len(tracks), self.welcome)
        weights = None
        if gates is not None and self.welcome.uses_gates:
            weights = routing.checked_gates(gates, told)
        if first == ADRIFT:
            known = [position for position, track in enumerate(tracks) if track.seen != ADRIFT]
            if not known:
                return []
            tracks, told = [tracks[position] for position in known], told[known]
            weights = None if weights is None else weights[known]
            first = _next_layer(tracks)
        return self._route(tracks, first, told, weights, self.welcome)

    def ask(self, handles: Handles) -> list[bytes]:
        """Forecasts of these sequences are wanted now. Raises RequestInvalid."""
        tracks = self._find(handles)
        _next_layers_exist(tracks)
        messages = self._ledger.catch_up(tracks)
        for track in tracks:
            track.due = track.seen
        asked = [track for track in tracks if track.in_step]
        if not asked:
            return messages
        return [*messages, self._ledger.ask(asked)]

    def end(self, handles: Handles) -> list[bytes]:
        """The tokens in progress end early and are forgotten. Raises RequestInvalid."""
        tracks = self._find(handles)
        _next_layers_exist(tracks)
        told = [track for track in tracks if track.in_step]
        for track in tracks:
            track.seen = IDLE
        return [self._ledger.end(told)] if told else []

    def close(self, handles: Handles) -> list[bytes]:
        """Forget sequences. Raises RequestInvalid."""
        tracks = self._find(handles)
        for track in tracks:
            del self._tracks[track.handle]
            self._free_rows.append(track.row)
        return self._ledger.forget(tracks)

    def insist(self, handle: int) -> list[bytes]:
        """What it takes for a sequence's forecast to come, as it is waited for. Raises RequestInvalid."""
        tracks = self._find((handle,))
        if not tracks[0].in_step:
            return self._ledger.catch_up(tracks)
        if not self.outdated(handle):
            return []
        # Asked for alone, it would make the newest union one of itself.
        together = self._ledger.union_tracks() if self._options.union else []
        return self._ask_again(together if tracks[0] in together else tracks)

    def insist_on_union(self) -> list[bytes]:
        """What it takes for the union to come that is waited for."""
        return self._ask_again(self._ledger.union_tracks()) if self.union_outdated() else []

    def latest(self, handle: int) -> SequenceForecast | None:
        """The newest forecast of the token in progress. Raises RequestInvalid."""
        (track,) = self._find((handle,))
        if track.newest is None or track.seen < 0:
            return None
        return SequenceForecast(*track.newest, handle, track.started - 1)

    def outdated(self, handle: int) -> bool:
        """Whether a forecast is wanted that is newer than the newest one. Raises RequestInvalid."""
        (track,) = self._find((handle,))
        if track.seen < 0:
            return track.seen == ADRIFT
        return track.due > (-1 if track.newest is None else track.newest[0].first_layer)

    def in_step(self, handle: int) -> bool:
        """Whether the service knows the sequence as it is."""
        return self._tracks[handle].in_step

    def latest_union(self) -> UnionForecast | None:
        """The newest union, while all of its sequences are within the token it is of."""
        handles = None if self._union is None else self._ledger.sharing(self._union)
        return None if self._union is None or handles is None else UnionForecast(self._union, handles)

    def union_outdated(self) -> bool:
        """Whether a union is wanted that is newer than the newest one."""
        newest = 0 if self._union is None else self._union.tag
        return self._ledger.union_tag != newest and bool(self._ledger.union_tracks())

    def receive(self, message: bytes) -> None:
        """What the service says. Raises AnswerInvalid where it is none of its messages."""
        kind = frames.kind_of(message)
        if kind == frames.FORECAST:
            self._ledger.take_forecast(self._ranking(message))
        elif kind == frames.UNION:
            self._union = self._ranking(message)
        elif kind == frames.ERROR:
            self._refused(*frames.read_error(message))
        elif kind == frames.GOODBYE:
            self.milliseconds_left = frames.read_goodbye(message)
        elif kind == frames.EXPIRED:
            self._ledger.expired(frames.read_expired(message))
        else:
            raise frames.invalid(f"kind {kind}")

    def prepare(self, welcome: Welcome) -> list[Past]:
        """What to tell a new connection of sequences. Tokens of another shape are of no use to it."""
        if self.welcome is None or self.welcome.shape != welcome.shape:
            self._rows = self._ledger.rows = Rows((welcome.num_layers, welcome.top_k), welcome.expert)
            for track in self._tracks.values():
                self._reshape(track, welcome)
        self.welcome = self._ledger.welcome = welcome
        return self._ledger.pasts(self._tracks.values())

    def attach(self, pasts: collections.abc.Sequence[Past]) -> list[bytes]:
        """The connection that was told the pasts is the stream's from now on."""
        return self._ledger.attach(pasts, self._tracks)

    def detach(self) -> None:
        """The connection is gone."""
        self.milliseconds_left, self.dropped, self.last_words, self._union = None, 0, {}, None
        self._ledger.detach(self._tracks.values())

    def _ask_again(self, tracks: list[Track]) -> list[bytes]:
        """Routing that made no forecast due may have overtaken, and so dropped, the one that was."""
        if all(track.due >= track.seen for track in tracks):
            return []
        for track in tracks:
            track.due = track.seen
        return [self._ledger.ask(tracks)]

    def _find(self, handles: Handles) -> list[Track]:
        try:
            tracks = [self._tracks[handle] for handle in handles]
        except KeyError as error:
            raise wrong(
                f"Sequence {error.args[0]} is not open.", "Use what open() gave, until it is closed."
            ) from None
        if not tracks or (len(tracks) > 1 and len(set(handles)) < len(tracks)):
            raise wrong("No sequence was named, or one twice.", "Name each sequence once.")
        return tracks

    def _route(
        self, tracks: list[Track], first: int, told: Experts, weights: Gates | None, welcome: Welcome
    ) -> list[bytes]:
        end = first + told.shape[1]
        _check_room(first, end, told, welcome)
        self._rows.write([track.row for track in tracks], first, told, weights)
        due = end < welcome.num_layers and self._options.due(first, end)
        for track in tracks:
            track.seen = end
            if due:
                track.due = end
            if weights is not None:
                track.gated = True
        if end == welcome.num_layers:
            for track in tracks:
                track.finish(*self._rows.read(track.row, track.gated))
        if _in_step(tracks):
            return [self._ledger.routing(tracks, first, told, weights)]
        known = [position for position, track in enumerate(tracks) if track.in_step]
        messages = []
        if known:
            of_known = [tracks[position] for position in known]
            weights = None if weights is None else weights[known]
            messages = [self._ledger.routing(of_known, first, told[known], weights)]
        return messages + self._ledger.catch_up(tracks)

    def _ranking(self, message: bytes) -> Ranking:
        if self.welcome is None:
            raise frames.invalid("a forecast before the welcome")
        ranking = Ranking(message, self.welcome.expert)
        if ranking.first_layer + ranking.num_layers > self.welcome.num_layers:
            raise frames.invalid(f"a forecast of layer {ranking.first_layer + ranking.num_layers - 1}")
        self.dropped = ranking.dropped
        return ranking

    def _refused(self, tag: int, fatal: bool, words: dict[str, str]) -> None:
        if fatal:
            self.last_words = words
            return
        self._ledger.refused(tag)
        self._on_refused(MessageRefused(words["message"], remedy=words["remedy"], code=words["code"]))

    def _reshape(self, track: Track, welcome: Welcome) -> None:
        track.history.clear()
        for token in track.context:
            try:
                track.history.append(routing.checked_token(token, welcome))
            except RequestInvalid as error:
                # It was opened before the shape was known: too late to raise where it was wrong.
                self._on_refused(MessageRefused(error.message, remedy=error.remedy, code=error.code))
        track.context, track.finished, track.told, track.newest = (), len(track.history), 0, None
        if track.seen != IDLE:
            track.seen = ADRIFT


def _in_step(tracks: list[Track]) -> bool:
    return all([track.in_step for track in tracks])  # noqa: C419  # a list is faster than a generator


def _next_layer(tracks: list[Track]) -> int:
    """The layer that comes next, the same for all; ADRIFT where that is not known of one."""
    first = tracks[0].seen
    for track in tracks:
        if track.seen != first:
            if ADRIFT in (track.seen, first):
                return ADRIFT
            raise wrong(
                f"Sequences {tracks[0].handle} and {track.handle} are at layers {first} and {track.seen}.",
                "Tell sequences that are at different layers in calls of their own.",
            )
    if first == IDLE:
        _next_layers_exist(tracks)
    return first


def _next_layers_exist(tracks: list[Track]) -> None:
    for track in tracks:
        if track.seen == IDLE:
            raise wrong(f"Sequence {track.handle} has no token in progress.", "Begin one with start().")


def _check_room(first: int, end: int, told: Experts, welcome: Welcome) -> None:
    if end > welcome.num_layers:
        raise wrong(
            f"Layers {first} to {end - 1} were told, but the model has {welcome.num_layers}.",
            "Count MoE layers only, from 0.",
        )
    size = frames.HEADER.size + 4 * len(told) + told.size * (4 + told.itemsize)
    if size > welcome.max_frame_bytes:
        raise wrong(
            f"Routing of {size} bytes came, the service takes {welcome.max_frame_bytes}.",
            "Tell fewer sequences or layers in a call.",
        )
