"""All streams of one version: their sequences' state, and forecasts computed together.

Connection -> Hub: open, start, tell, ... -> tick -> Connection.deliver

Messages only note what is due. One tick, at the end of the event loop's round in which they came, works all
of it off: finished tokens become history, then one model call forecasts for every sequence that waits,
whichever connection it belongs to. A sequence waits for one forecast at most, the newest. What clients need
not wait for, metrics and scores, comes in a tick of its own, when forecasts are on their way.

.venv/bin/python -m pytest tests/service/stream/test_conversation.py
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int64, Integer

from service.errors import SequencesExhausted
from service.loading import Running
from service.settings import Settings
from service.stream.awake import Awake
from service.stream.history import History
from service.stream.scoring import Learner, Scoring
from speculation.coverage import CoverageSets
from speculation.live import LiveScores
from speculation.slots import Slots
from speculation.steps import Steps

# Rows that are forecast in a tick, before the loop may look at its sockets again: some 4 ms.
TICK_ROWS = 256
# How much a new measurement counts in the running average of a forecast's time.
FRESH = 0.1


class Client(Learner, Protocol):
    """Whom a sequence belongs to and forecasts go to."""

    deadline_s: float
    dropped: int

    @property
    def congested(self) -> bool: ...

    def deliver(self, due: Due, probabilities: Float32[np.ndarray, "n L E"]) -> None: ...

    def expire(self, rows: list[int]) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass(eq=False, slots=True)
class Made:
    """Forecasts on their way, of which note is to be taken. Times as of `time.perf_counter`."""

    dues: list[Due]
    probabilities: Float32[np.ndarray, "n L E"]
    model_s: float
    sent_at: float


@dataclass(eq=False, slots=True)
class Due:
    """A forecast that a message asked for: of rows that have all seen the same layers.

    A row waits for it for as long as `Hub` says so: newer messages may have overtaken it.
    """

    client: Client
    tag: int
    seen: int
    rows: list[int]
    asked_at: float


class Hub:
    """Belongs to one event loop; holds the version in memory for as long as streams use it."""

    def __init__(self, running: Running, settings: Settings) -> None:
        self.running = running
        self._settings = settings
        capacity = settings.max_stream_sequences
        self.slots = Slots(Steps(running.speculator), capacity)
        self._spec = running.speculator.spec
        self.scores = LiveScores(self._spec, _coverage_sets(running))
        self._owner: list[Client | None] = [None] * capacity
        self._waits: list[Due | None] = [None] * capacity
        self._dues: deque[Due] = deque()
        self._history = History(self.slots, settings)
        self._scoring = Scoring(self.scores, settings.stream_score_share)
        self._used_at = np.zeros(capacity)
        self._loop = asyncio.get_running_loop()
        self._tick_comes = False
        self._made: list[Made] = []
        self._forecast_s = 0.0
        self._awake = Awake(self._loop, settings.stream_spin_us / 1e6, self.slots.keep_warm)

    def check_room(self, count: int) -> None:
        """Raises SequencesExhausted where so many more sequences do not fit."""
        most = self._settings.max_stream_sequences
        if self.slots.in_use + count > most:
            raise SequencesExhausted(
                f"{count} more sequences were to be opened, but the streams of {self._spec.model} hold "
                f"{self.slots.in_use} of at most {most}.",
                remedy="Close some, or raise SPECMOE_MAX_STREAM_SEQUENCES.",
            )

    def open(self, client: Client) -> int:
        """A row for a new sequence; `check_room` comes before it."""
        row = self.slots.open()
        self._owner[row] = client
        self._used_at[row] = time.monotonic()
        return row

    def close(self, row: int) -> None:
        """Forget a sequence and whatever waits for it."""
        self._overtake(row)
        self._take_note()
        self._history.forget(row)
        self._scoring.forget(row)
        self._owner[row] = None
        self.slots.close(row)

    def add_history(
        self,
        row: int,
        token_ids: Int64[np.ndarray, "T"],
        experts: Integer[np.ndarray, "T L K"],
        gates: Float32[np.ndarray, "T L K"] | None,
    ) -> None:
        """Finished tokens of a sequence, worked off tick by tick. Raises ContextTooLong."""
        self._history.add(row, token_ids, experts, gates)
        self.use(row)
        self._schedule()

    def start(self, rows: list[int], token_ids: Int64[np.ndarray, "n"]) -> None:
        """Begin a token of each row."""
        self._take_note()
        self._history.settle(rows)
        self.slots.start(np.array(rows), token_ids)
        for row in rows:
            self._overtake(row)
            self._scoring.begin(row, self._owner[row])
        self.use(rows)

    def tell(
        self,
        rows: list[int],
        first_layer: int,
        experts: Integer[np.ndarray, "n m K"],
        gates: Float32[np.ndarray, "n m K"] | None,
    ) -> None:
        """The routing of the next layers; a token whose last layer it is becomes history."""
        self.slots.tell(np.array(rows), first_layer, experts, gates)
        self.use(rows)
        end = first_layer + experts.shape[1]
        if end < self._spec.num_layers:
            self._bring_up_to_date(rows, end)
            return
        self._take_note()
        for row in rows:
            self._overtake(row)
            self._scoring.finish(row, self.slots.routing(row))
            self._history.finish(row)
        self._schedule()

    def end(self, rows: list[int]) -> None:
        """Forget the token in progress of each row."""
        self._take_note()
        for row in rows:
            self._overtake(row)
            self._scoring.forget(row)
        self.use(rows)

    def ask(self, client: Client, tag: int, seen: int, rows: list[int]) -> None:
        """Forecast for these rows, which have all seen so many layers, as soon as the tick comes."""
        due = Due(client, tag, seen, list(rows), time.perf_counter())
        for row in rows:
            self._overtake(row)
            self._waits[row] = due
        self._dues.append(due)
        self._schedule()

    def waits(self, row: int) -> bool:
        """Whether a forecast is due for the row."""
        return self._waits[row] is not None

    def wake(self) -> None:
        """A client that was congested reads again."""
        self._schedule()

    def expire(self) -> None:
        """Tell clients to forget the sequences that were not mentioned for too long."""
        long_ago = time.monotonic() - self._settings.stream_idle_seconds
        by_client: dict[Client, list[int]] = {}
        for row in np.flatnonzero(self._used_at < long_ago).tolist():
            owner = self._owner[row]
            if owner is not None:
                by_client.setdefault(owner, []).append(row)
        for client, rows in by_client.items():
            client.expire(rows)

    def use(self, rows: int | list[int]) -> None:
        """They were mentioned: they do not expire."""
        if isinstance(rows, list) and len(rows) == 1:
            rows = rows[0]
        self._used_at[rows] = time.monotonic()

    def _bring_up_to_date(self, rows: list[int], seen: int) -> None:
        """What these rows wait for is forecast from what was told by now."""
        waiting: dict[Due, list[int]] = {}
        for row in rows:
            due = self._waits[row]
            if due is not None:
                waiting.setdefault(due, []).append(row)
        for due, its_rows in waiting.items():
            newer = Due(due.client, due.tag, seen, its_rows, due.asked_at)
            for row in its_rows:
                self._waits[row] = newer
            self._dues.append(newer)

    def _overtake(self, row: int) -> None:
        """Drop the forecast that the row waits for: something newer came."""
        due = self._waits[row]
        if due is not None:
            self._waits[row] = None
            self._drop(due.client, 1)

    def _drop(self, client: Client, count: int) -> None:
        client.dropped += count
        self.running.metrics.dropped_forecasts.inc(count)

    def _schedule(self) -> None:
        if not self._tick_comes:
            self._tick_comes = True
            self._loop.call_soon(self._tick)
            self._awake.stay()

    def _tick(self) -> None:
        self._tick_comes = False
        try:
            self._work_off()
        except Exception as error:  # nobody knows what became of their sequences: let them begin anew
            for client in {owner for owner in self._owner if owner is not None}:
                client.fail(error)

    def _work_off(self) -> None:
        self._take_note()
        finished = self._history.take_finished()
        self._history.take_some_told()
        dues = self._ready()
        if dues:
            self._forecast(dues)
        self._scoring.learn_from_one()
        # After a token's end its next start may have come meanwhile, which should not wait for this.
        if not (dues or finished) or self._scoring.presses:
            self._scoring.score_one()
        if dues or self._history.waits or self._scoring.waits or self._more_can_be_done():
            self._schedule()

    def _more_can_be_done(self) -> bool:
        return any(not due.client.congested for due in self._dues)

    def _ready(self) -> list[Due]:
        """Dues that can be forecast now; those that must wait for their client or for history stay."""
        if not self._dues:
            return []
        now = time.perf_counter()
        ready: list[Due] = []
        later: list[Due] = []
        count = 0
        while self._dues and count < TICK_ROWS:
            due = self._dues.popleft()
            due.rows = [row for row in due.rows if self._waits[row] is due]
            if not due.rows:
                continue
            deadline_s = due.client.deadline_s
            if deadline_s and now + self._forecast_s > due.asked_at + deadline_s:
                for row in due.rows:
                    self._overtake(row)
                # An estimate that drops everything would never be measured again.
                self._forecast_s *= 1.0 - FRESH
            elif due.client.congested or self._history.delays(due.rows):
                later.append(due)
            else:
                ready.append(due)
                count += len(due.rows)
        self._dues.extend(later)
        return ready

    def _forecast(self, dues: list[Due]) -> None:
        rows = [row for due in dues for row in due.rows]
        for row in rows:
            self._waits[row] = None
        began = time.perf_counter()
        probabilities = self._probabilities(np.array(rows))
        ended = time.perf_counter()
        first = 0
        for due in dues:
            due.client.deliver(due, probabilities[first : first + len(due.rows)])
            first += len(due.rows)
        self._made.append(Made(dues, probabilities, ended - began, time.perf_counter()))

    def _take_note(self) -> None:
        """Of the forecasts that were made: how long they took, and what they said, to be scored."""
        metrics = self.running.metrics
        noted, self._made = self._made, []
        for made in noted:
            self._forecast_s += FRESH * (made.model_s - self._forecast_s)
            metrics.model_seconds.observe(made.model_s)
            metrics.forecasts.inc(len(made.probabilities))
            first = 0
            for due in made.dues:
                metrics.stream_seconds.observe(made.sent_at - due.asked_at)
                self._scoring.keep(due.rows, due.seen, made.probabilities[first : first + len(due.rows)])
                first += len(due.rows)

    def _probabilities(self, rows: Int64[np.ndarray, "n"]) -> Float32[np.ndarray, "n L E"]:
        most = self._settings.stream_batch_rows
        if len(rows) <= most:
            return self.slots.forecast(rows)
        return np.concatenate(
            [self.slots.forecast(rows[first : first + most]) for first in range(0, len(rows), most)]
        )


def _coverage_sets(running: Running) -> dict[float, CoverageSets]:
    speculator = running.speculator
    return {level: speculator.coverage_sets(level) for level in speculator.manifest.coverage.levels}
