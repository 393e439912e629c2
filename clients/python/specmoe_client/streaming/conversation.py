"""What `Stream` and `AsyncStream` have in common: everything that never waits, under one lock.

stream.py, async_stream.py -> conversation.py -> session.py, link.py; keeper.py hands new links over
"""

from __future__ import annotations

import collections.abc
import logging
import threading
import time
from dataclasses import dataclass
from typing import Literal

import numpy.typing as npt

from specmoe_client.client import DEFAULT_URL
from specmoe_client.errors import AnswerInvalid, AnswerLate, ClientError, NoPrediction, RequestRefused
from specmoe_client.failures import Failures, OnFailure
from specmoe_client.predictions import RoutingShape
from specmoe_client.questions import Token
from specmoe_client.streaming.connecting import Endpoint, Opened, ended, unreachable
from specmoe_client.streaming.forecasts import SequenceForecast, UnionForecast
from specmoe_client.streaming.frames import Welcome
from specmoe_client.streaming.keeper import Keeper
from specmoe_client.streaming.ledger import Past
from specmoe_client.streaming.link import Link
from specmoe_client.streaming.options import StreamOptions
from specmoe_client.streaming.retry import Patience
from specmoe_client.streaming.routing import wrong
from specmoe_client.streaming.session import Handles, Session

logger = logging.getLogger("specmoe_client")

State = Literal["connecting", "connected", "silent", "broken", "refused", "closed"]
# Enough for every predictor there is: beyond it averages have forgotten a token.
DEFAULT_HISTORY = 256


@dataclass(frozen=True)
class StreamStatus:
    """How a stream is.

    state: connecting (for the first time), connected, silent (connected, but the last waits were in vain),
        broken (it will be tried again), refused (it will not), or closed.
    last_failure: the newest thing that went wrong, kept until another does.
    dropped: forecasts that were due on this connection and not sent.
    spec, version: of the model, None before the first connection.
    milliseconds_left: what the service had left when it said that it will stop, else None.
    """

    state: State
    last_failure: ClientError | None
    dropped: int
    spec: RoutingShape | None
    version: int | None
    milliseconds_left: int | None


def late(timeout_ms: float) -> AnswerLate:
    """The error for a wait without a forecast."""
    return AnswerLate(
        f"No forecast within {timeout_ms:g} ms.",
        remedy="Look with latest() instead of waiting, or see the service's load.",
    )


class Conversation:
    """A stream with one MoE model, kept up in the background. To be used by one thread at a time.

    base_url: where the service listens. uds: path of its Unix socket, instead of TCP.
    history: finished tokens kept of each sequence, to be told again after a connection was lost.
    The rest: see StreamOptions.

    Raises ClientError or RequestInvalid where an argument is wrong.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        model: str,
        version: int | str | None = None,
        uds: str | None = None,
        top_n: int | None = None,
        coverage: float | None = None,
        adapt: bool = False,
        per_sequence: bool = True,
        union: bool = False,
        ahead: int = 0,
        at_start: bool = True,
        every: int = 1,
        deadline_ms: float | None = None,
        history: int = DEFAULT_HISTORY,
    ) -> None:
        self._options = StreamOptions(
            model, version, top_n, coverage, adapt, per_sequence, union, ahead, at_start, every, deadline_ms
        )
        self.history = history
        if history < 0:
            raise wrong(f"history is {history}.", "Give the number of finished tokens to keep, 0 or more.")
        self._failures = Failures()
        self._session = Session(self._options, history, self._failures.note)
        self._patience = Patience()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._linked_at_s = 0.0
        self._refusal: RequestRefused | None = None
        self._closed = False
        self._bind()
        self._keeper = Keeper(Endpoint(base_url, uds), self._options.hello(), self._lock, self)
        self._keeper.start()

    @property
    def options(self) -> StreamOptions:
        """What it was opened with."""
        return self._options

    @property
    def last_failure(self) -> ClientError | None:
        """The newest thing that went wrong, kept until another does."""
        return self._refusal or self._failures.last

    @property
    def status(self) -> StreamStatus:
        """How the stream is."""
        with self._lock:
            welcome = self._session.welcome
            return StreamStatus(
                self._state(),
                self.last_failure,
                self._session.dropped,
                None if welcome is None else RoutingShape(*welcome.shape),
                None if welcome is None else welcome.version,
                self._session.milliseconds_left,
            )

    def open(self, context: collections.abc.Sequence[Token] = ()) -> int:
        """A new sequence; gives its handle. context: finished tokens, oldest first; the last `history` count.

        Before the first connection nothing but the context can be kept: forecasts begin with the next token.
        Raises RequestInvalid, as everything that names or tells something does where that is wrong.
        """
        with self._lock:
            handle, messages = self._session.open(context)
            self._send(messages)
        return handle

    def start(self, sequences: Handles, token_ids: npt.ArrayLike | None = None) -> None:
        """A token of each sequence begins. token_ids: `[n]`, of the model's own tokenizer; -1: unknown."""
        with self._lock:
            self._send(self._session.start(sequences, token_ids))

    def route(self, sequences: Handles, experts: npt.ArrayLike, gates: npt.ArrayLike | None = None) -> None:
        """The routed experts of each sequence's next layer `[n, K]`, or its next m layers `[n, m, K]`.

        experts: integers, in any order. gates: router weights in the same order, on any positive scale.
        Sequences of one call are at the same layer. The last layer ends the token.
        """
        with self._lock:
            self._send(self._session.route(sequences, experts, gates))

    def ask(self, sequences: Handles) -> None:
        """Have a forecast made now of each sequence's token in progress: where `every` is 0, for example."""
        with self._lock:
            self._send(self._session.ask(sequences))

    def end(self, sequences: Handles) -> None:
        """The tokens in progress end before their last layer and are forgotten."""
        with self._lock:
            self._send(self._session.end(sequences))

    def close_sequences(self, sequences: Handles) -> None:
        """Forget sequences; their handles are not used again."""
        with self._lock:
            self._send(self._session.close(sequences))

    def latest(self, sequence: int) -> SequenceForecast | None:
        """The newest forecast of the token in progress, at once; None while there is none."""
        with self._lock:
            self._receive()
            return self._session.latest(sequence)

    def latest_union(self) -> UnionForecast | None:
        """The newest union, at once; None while there is none whose sequences are all within its tokens."""
        with self._lock:
            self._receive()
            return self._session.latest_union()

    # For the keeper, which holds the lock.

    def wanted(self) -> bool:
        """Whether a connection is missing."""
        return self._link is None and not self._closed

    def over(self) -> bool:
        """Whether no connection will be wanted any more."""
        return self._closed or self._refusal is not None

    def prepare(self, welcome: Welcome) -> list[Past]:
        """What a new connection is to be told before it is handed over."""
        return self._session.prepare(welcome)

    def hand_over(self, opened: Opened, pasts: list[Past]) -> None:
        """The new connection is the stream's from now on."""
        self._link, self._linked_at_s = opened.link, time.monotonic()
        self._patience.restore()
        self._hear(opened.messages)
        self._send(self._session.attach(pasts))
        if self._link is not None:
            self._linked(self._link)
        self._changed()

    def fail(self, failure: ClientError) -> None:
        """A connection could not be made, or was lost."""
        failure.__traceback__ = failure.__cause__ = failure.__context__ = None
        if isinstance(failure, NoPrediction):
            self._failures.note(failure)
        elif isinstance(failure, RequestRefused):
            self._refusal = failure
            logger.error("The stream is refused and will not be tried again: %s", failure)
        self._changed()

    def beat(self) -> Link | None:
        """From time to time: the link, if there is one, after all that came has been heard."""
        self._receive()
        return self._link

    def lose(self, failure: ClientError) -> None:
        """The connection is of no use any longer."""
        link, self._link = self._link, None
        if link is not None:
            self._session.detach()
            self._unlinked(link)
            self._keeper.lived(time.monotonic() - self._linked_at_s)
            self.fail(failure)

    # What differs between the shells.

    def _bind(self) -> None:
        """Before the keeper begins."""

    def _linked(self, link: Link) -> None:
        """A link was handed over, in the keeper's thread."""

    def _unlinked(self, link: Link) -> None:
        """A link is over, in whichever thread found out."""
        link.close()

    def _heard(self) -> None:
        """Messages have come, in whichever thread."""

    def _changed(self) -> None:
        """There is a link, or a failure, that was not there before; in whichever thread."""
        self._keeper.changed.notify_all()

    # For the shells.

    def _shut(self) -> None:
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
            if link is not None:
                self._session.detach()
                self._unlinked(link)
            self._changed()

    def _state(self) -> State:
        if self._closed:
            return "closed"
        if self._refusal is not None:
            return "refused"
        if self._link is None:
            return "connecting" if self._session.welcome is None and self._failures.last is None else "broken"
        return "silent" if self._patience.exhausted else "connected"

    def _send(self, messages: list[bytes]) -> None:
        link = self._link
        if link is not None and messages:
            link.send(messages)
            if link.failing:
                self._receive()

    def _receive(self) -> None:
        link = self._link
        if link is not None:
            self._hear(link.receive())
            if link.lost is not None:
                self.lose(ended(link.lost, self._session.last_words))

    def _hear(self, messages: list[bytes]) -> None:
        if not messages:
            return
        self._patience.restore()
        try:
            for message in messages:
                self._session.receive(message)
        except AnswerInvalid as failure:
            self.lose(failure)
        self._heard()

    def _is_ready(self) -> bool:
        """Raises what the service refused the stream for."""
        if self._refusal is not None:
            raise self._refusal
        return self._link is not None

    def _insist(self, sequence: int | None) -> None:
        """Before waiting: see to it that there is something to wait for. Raises RequestInvalid."""
        if sequence is None and not self._options.union:
            raise wrong("The stream was opened without union forecasts.", "Open it with union=True.")
        if sequence is not None and not self._options.per_sequence:
            raise wrong("The stream was opened without forecasts of sequences.", "Wait for the union.")
        self._send(self._session.insist_on_union() if sequence is None else self._session.insist(sequence))

    def _wanted(self, sequence: int | None) -> tuple[bool, SequenceForecast | UnionForecast | None]:
        """(whether to wait for a newer one, the newest). None: the union."""
        if sequence is None:
            return self._session.union_outdated(), self._session.latest_union()
        return self._session.outdated(sequence), self._session.latest(sequence)

    def _can_come(self, sequence: int | None) -> bool:
        """Whether waiting is of any use."""
        if self._link is None or self._patience.exhausted:
            return False
        return sequence is None or self._session.in_step(sequence)

    def _in_vain(self, sequence: int | None, timeout_ms: float, on_failure: OnFailure) -> None:
        """A wait has ended without a forecast. Raises why, where that is wanted."""
        if self._link is not None and (sequence is None or self._session.in_step(sequence)):
            self._patience.lose()
            self._failures.note(late(timeout_ms))
        if on_failure == "raise":
            raise self.last_failure or unreachable("it is being opened, or was closed")
