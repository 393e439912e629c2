"""A stream after hello: its sequences, what its messages do to them, what it is forecast.

Connection -> Conversation.take -> Hub; Hub -> Conversation.deliver -> Connection

A message is checked whole before anything of it is done, so that a refused one leaves no trace.

.venv/bin/python -m pytest tests/service/stream/test_conversation.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Integer

from service.errors import MessageInvalid
from service.stream.checks import check_experts, check_gates, check_token_ids
from service.stream.forecasts import Forecasts
from service.stream.hub import Due, Hub
from service.stream.messages import (
    MAX_COUNT,
    Context,
    Encoding,
    Hello,
    Kind,
    Message,
    Named,
    Routing,
    Start,
)
from service.stream.scoring import Kept

# Of a sequence between two tokens.
IDLE = -1


class Speaker(Protocol):
    """Whom a conversation speaks through."""

    @property
    def congested(self) -> bool: ...

    @property
    def encoding(self) -> Encoding: ...

    def send(self, message: bytes | str) -> None: ...

    def tell(self, message: bytes | str) -> None: ...

    def refuse(self, error: Exception) -> None: ...


@dataclass(eq=False, slots=True)
class Tracked:
    """A sequence of this conversation. seen: layers told of the token in progress, or IDLE.

    token: how many were started before the one in progress.
    """

    name: int
    row: int
    seen: int = IDLE
    token: int = -1


class Conversation:
    """The sequences of one connection; a `Client` of its hub."""

    def __init__(self, hub: Hub, hello: Hello, forecasts: Forecasts, speaker: Speaker) -> None:
        self.hub = hub
        self.deadline_s = hello.deadline_us / 1e6
        self.dropped = 0
        self._hello, self._forecasts, self._speaker = hello, forecasts, speaker
        self._spec = hub.running.speculator.spec
        self._sequences: dict[int, Tracked] = {}
        self._by_row: dict[int, Tracked] = {}

    @property
    def congested(self) -> bool:
        """Whether forecasts had better wait."""
        return self._speaker.congested

    @property
    def adapts(self) -> bool:
        """Whether it is to be told what finished tokens were routed to."""
        return self._forecasts.adapts

    def learn(self, forecasts: Kept, routing: Integer[np.ndarray, "L K"]) -> None:
        """The forecasts of a finished token, each with the layers seen, and what it was routed to."""
        self._forecasts.learn(forecasts, routing)

    def take(self, message: Message) -> None:
        """Do what a message says. Raises MessageInvalid, and then nothing of it was done."""
        match message:
            case Routing():
                self._routing(message)
            case Start():
                self._start(message)
            case Named(kind=Kind.OPEN):
                self._open(message)
            case Named(kind=Kind.CLOSE):
                self._known(message.sequences)
                self._forget(message.sequences)
            case Named(kind=Kind.ASK):
                self._ask(message)
            case Named():
                self._end(message)
            case Context():
                self._context(message)

    def deliver(self, due: Due, probabilities: Float32[np.ndarray, "n L E"]) -> None:
        """Send a forecast that the hub made."""
        sequences = [self._by_row[row] for row in due.rows]
        names = [sequence.name for sequence in sequences]
        tokens = [sequence.token for sequence in sequences]
        encoding = self._speaker.encoding
        for kind, ranking in self._forecasts.rankings(due, names, tokens, self.dropped, probabilities):
            self._speaker.send(
                encoding.forecast(ranking) if kind is Kind.FORECAST else encoding.union(ranking)
            )

    def expire(self, rows: list[int]) -> None:
        """Forget sequences that were not used for too long, and say so."""
        names = [self._by_row[row].name for row in rows]
        self._forget(names)
        for first in range(0, len(names), MAX_COUNT):
            self._speaker.tell(self._speaker.encoding.expired(names[first : first + MAX_COUNT]))

    def fail(self, error: Exception) -> None:
        """The service has failed these sequences."""
        self._speaker.refuse(error)

    def forget_all(self) -> None:
        """The connection ended."""
        self._forget(list(self._sequences))

    def waits(self) -> bool:
        """Whether a forecast is due that was not sent."""
        return any(self.hub.waits(row) for row in self._by_row)

    def _open(self, message: Named) -> None:
        _check_different(message.sequences)
        for position, name in enumerate(message.sequences):
            if name in self._sequences:
                raise MessageInvalid(
                    f"sequences[{position}] is {name}, which is open already.",
                    remedy="Close it first, or choose another number.",
                )
        self.hub.check_room(len(message.sequences))
        for name in message.sequences:
            sequence = Tracked(name, self.hub.open(self))
            self._sequences[name] = self._by_row[sequence.row] = sequence

    def _context(self, message: Context) -> None:
        (sequence,) = self._between_tokens([message.sequence])
        self._check_routed(message.experts, message.gates)
        check_token_ids(message.token_ids)
        self.hub.add_history(sequence.row, message.token_ids, message.experts, message.gates)

    def _start(self, message: Start) -> None:
        sequences = self._between_tokens(message.sequences)
        check_token_ids(message.token_ids)
        rows = [sequence.row for sequence in sequences]
        self.hub.start(rows, message.token_ids)
        for sequence in sequences:
            sequence.seen = 0
            sequence.token += 1
        if self._hello.at_start:
            self.hub.ask(self, message.tag, 0, rows)

    def _routing(self, message: Routing) -> None:
        sequences = self._known(message.sequences)
        first, end = message.first_layer, message.first_layer + message.experts.shape[1]
        for position, sequence in enumerate(sequences):
            if sequence.seen != first:
                raise _wrong_layer(position, sequence, first)
        if end > self._spec.num_layers:
            raise MessageInvalid(
                f"layers {first} to {end - 1} were told, expected up to {self._spec.num_layers - 1}.",
                remedy="Count MoE layers only, from 0.",
            )
        self._check_routed(message.experts, message.gates)
        rows = [sequence.row for sequence in sequences]
        self.hub.tell(rows, first, message.experts, message.gates)
        finished = end == self._spec.num_layers
        for sequence in sequences:
            sequence.seen = IDLE if finished else end
        every = self._hello.every
        if every and not finished and end // every > first // every:
            self.hub.ask(self, message.tag, end, rows)

    def _end(self, message: Named) -> None:
        sequences = self._in_progress(message.sequences)
        self.hub.end([sequence.row for sequence in sequences])
        for sequence in sequences:
            sequence.seen = IDLE

    def _ask(self, message: Named) -> None:
        by_seen: dict[int, list[int]] = {}
        for sequence in self._in_progress(message.sequences):
            by_seen.setdefault(sequence.seen, []).append(sequence.row)
        for seen, rows in by_seen.items():
            self.hub.use(rows)
            self.hub.ask(self, message.tag, seen, rows)

    def _known(self, names: Sequence[int]) -> list[Tracked]:
        """The sequences of these names. Raises MessageInvalid where one is not open or stands there twice."""
        try:
            found = [self._sequences[name] for name in names]
        except KeyError as error:
            raise MessageInvalid(
                f"sequences[{list(names).index(error.args[0])}] is {error.args[0]}, which is not open.",
                remedy="Open it first. It may have expired.",
            ) from None
        _check_different(names)
        return found

    def _between_tokens(self, names: Sequence[int]) -> list[Tracked]:
        sequences = self._known(names)
        for position, sequence in enumerate(sequences):
            if sequence.seen != IDLE:
                raise MessageInvalid(
                    f"sequences[{position}], {sequence.name}, is within a token: "
                    f"{sequence.seen} of its layers were told.",
                    remedy="Tell its remaining layers, or end it.",
                )
        return sequences

    def _in_progress(self, names: Sequence[int]) -> list[Tracked]:
        sequences = self._known(names)
        for position, sequence in enumerate(sequences):
            if sequence.seen == IDLE:
                raise _between(position, sequence)
        return sequences

    def _check_routed(self, experts: np.ndarray[Any, Any], gates: np.ndarray[Any, Any] | None) -> None:
        check_experts(experts, self._spec)
        if gates is not None:
            check_gates(gates)

    def _forget(self, names: Sequence[int]) -> None:
        for name in names:
            sequence = self._sequences.pop(name)
            del self._by_row[sequence.row]
            self.hub.close(sequence.row)


def _check_different(names: Sequence[int]) -> None:
    if len(names) > 1 and len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise MessageInvalid(f"sequences names {twice} twice.", remedy="Name each sequence once.")


def _wrong_layer(position: int, sequence: Tracked, first_layer: int) -> MessageInvalid:
    if sequence.seen == IDLE:
        return _between(position, sequence)
    return MessageInvalid(
        f"first_layer is {first_layer}, expected {sequence.seen} for sequences[{position}], {sequence.name}.",
        remedy="Tell layers in order, each once; sequences at other layers in a message of their own.",
    )


def _between(position: int, sequence: Tracked) -> MessageInvalid:
    return MessageInvalid(
        f"sequences[{position}], {sequence.name}, has no token in progress.", remedy="Begin one with start."
    )
