"""A stream's session against the toy service without any socket: whatever is told, and whenever a connection
comes or goes in between, the service ends up knowing exactly what a naive record knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specmoe_client import MessageRefused
from specmoe_client.streaming import frames
from specmoe_client.streaming.ledger import Past, opening
from specmoe_client.streaming.options import StreamOptions
from specmoe_client.streaming.session import Session

from tests.contract.toy_book import EXPERTS, LAYERS, Behaviour, Book, Told, ranked

WIDTH = 4
REMEMBERED = 1000


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmoe_client.streaming.ledger.REOPEN_AFTER_S", 0.0)


@dataclass
class Naive:
    """The same conversation, told to a session and to a record that is too simple to be wrong."""

    options: StreamOptions
    record: dict[int, Told] = field(default_factory=dict)
    refusals: list[MessageRefused] = field(default_factory=list)
    book: Book | None = None
    delayed: list[bytes | str] = field(default_factory=list)
    coming: tuple[Book, list[Past]] | None = None

    def __post_init__(self) -> None:
        self.session = Session(self.options, REMEMBERED, self.refusals.append)

    def handles(self, mask: int) -> list[int]:
        return [handle for position, handle in enumerate(self.record) if mask >> position & 1]

    def send(self, messages: list[bytes]) -> None:
        """Everything there and back again."""
        if self.book is None:
            assert messages == []
            return
        for message in messages:
            self.book.take(message)
        answers, self.book.answers = self.delayed + self.book.answers, []
        self.delayed = []
        for answer in answers:
            assert isinstance(answer, bytes)
            self.session.receive(answer)

    def open(self, mask: int, seed: int) -> None:
        if len(self.record) < 4:
            handle, messages = self.session.open(())
            self.record[handle] = Told()
            self.send(messages)

    def start(self, mask: int, seed: int) -> None:
        handles = [handle for handle in self.handles(mask) if self.record[handle].token_id is None]
        if handles:
            messages = self.session.start(handles, [seed + handle for handle in handles])
            for handle in handles:
                told = self.record[handle]
                told.token_id, told.layers = seed + handle, []
            self.send(messages)

    def route(self, mask: int, seed: int) -> None:
        handles = [handle for handle in self.handles(mask) if self.record[handle].token_id is not None]
        if not handles:
            return
        seen = len(self.record[handles[0]].layers)
        handles = [handle for handle in handles if len(self.record[handle].layers) == seen]
        count = 1 if seed % 4 else LAYERS - seen
        random = np.random.default_rng(seed)
        experts = np.array([[random.permutation(EXPERTS)[:2] for _ in range(count)] for _ in handles])
        gates = None if seed % 3 == 0 else random.integers(1, 9, experts.shape)
        messages = self.session.route(handles, experts, gates)
        for row, handle in enumerate(handles):
            self._record(self.record[handle], experts[row], None if gates is None else gates[row])
        self.send(messages)

    def _record(self, told: Told, experts: Any, gates: Any) -> None:
        weights = np.ones(experts.shape) if gates is None else gates.astype(float)
        told.layers += list(zip(experts.tolist(), weights.tolist(), strict=True))
        if len(told.layers) == LAYERS:
            told.past.append((told.token_id, told.layers))
            told.token_id = None

    def end(self, mask: int, seed: int) -> None:
        handles = [handle for handle in self.handles(mask) if self.record[handle].token_id is not None]
        if handles:
            messages = self.session.end(handles)
            for handle in handles:
                self.record[handle].token_id = None
            self.send(messages)

    def ask(self, mask: int, seed: int) -> None:
        handles = [handle for handle in self.handles(mask) if self.record[handle].token_id is not None]
        if handles:
            self.send(self.session.ask(handles))

    def close(self, mask: int, seed: int) -> None:
        handles = self.handles(mask)[:1]
        if handles:
            messages = self.session.close(handles)
            del self.record[handles[0]]
            self.send(messages)

    def lose(self, mask: int, seed: int) -> None:
        if self.book is not None:
            self.session.detach()
            self.book, self.delayed = None, []

    def begin_connecting(self, mask: int, seed: int) -> None:
        """What the keeper's thread does before it hands over; everything else may happen before it does."""
        if self.book is None and self.coming is None:
            book = Book(Behaviour())
            book.take(self.options.hello())
            (welcome,) = book.answers
            assert isinstance(welcome, bytes)
            book.answers = []
            read = frames.read_welcome(welcome)
            pasts = self.session.prepare(read)
            for past in pasts:
                for message in opening(past, read):
                    book.take(message)
            self.coming = book, pasts

    def end_connecting(self, mask: int, seed: int) -> None:
        if self.coming is not None:
            self.book, pasts = self.coming
            self.coming = None
            self.send(self.session.attach(pasts))

    def expire(self, mask: int, seed: int) -> None:
        """The service forgets some sequences; in every second case the client hears of it too late."""
        if self.book is not None and self.book.sequences:
            names = [name for position, name in enumerate(self.book.sequences) if seed >> position & 1]
            if names:
                self.book.expire(*names)
                if mask % 2:
                    self.delayed, self.book.answers = self.book.answers, []
                self.send([])

    def check(self, handle: int) -> None:
        told, forecast = self.record[handle], self.session.latest(handle)
        if told.token_id is None:
            assert forecast is None
            return
        assert forecast is not None
        assert forecast.seen == len(told.layers)
        assert forecast.experts.tolist() == [
            ranked(told, layer, WIDTH) for layer in range(forecast.seen, LAYERS)
        ]


# Much is told for each thing that goes wrong, mostly of all sequences.
TOLD = ["start"] * 6 + ["route"] * 12 + ["open", "ask", "end"]
WRONG = ["lose"] + ["begin_connecting", "end_connecting"] * 3 + ["expire"] * 2 + ["close"]
MASKS = st.sampled_from([15, 15, 15, 7, 6, 5, 3, 2, 1])
SCRIPT = st.lists(
    st.tuples(st.sampled_from(TOLD + WRONG), MASKS, st.integers(0, 40)), min_size=20, max_size=80
)


def connected(options: StreamOptions) -> Naive:
    """A conversation of three sequences that has begun."""
    naive = Naive(options)
    naive.begin_connecting(0, 0)
    naive.end_connecting(0, 0)
    for _ in range(3):
        naive.open(0, 0)
    return naive


@settings(max_examples=300, deadline=None)
@given(SCRIPT)
def test_the_service_knows_whatever_was_told(script: list[tuple[str, int, int]]) -> None:
    naive = connected(StreamOptions("toy"))
    expired = False
    for step, mask, seed in script:
        getattr(naive, step)(mask, seed)
        expired = expired or step == "expire"
        if naive.book is not None and not naive.delayed:
            for handle in naive.record:
                if naive.session.in_step(handle):
                    naive.check(handle)
    naive.begin_connecting(0, 0)
    naive.end_connecting(0, 0)
    for _ in range(2):  # the first message may be one too many for a sequence that has expired
        for handle in naive.record:
            naive.send(naive.session.insist(handle))
            if naive.record[handle].token_id is not None:
                naive.send(naive.session.ask([handle]))
    for handle in naive.record:
        naive.check(handle)
    assert naive.book is not None
    assert expired or naive.book.refused == []


@settings(max_examples=100, deadline=None)
@given(SCRIPT, st.booleans(), st.integers(0, 5), st.booleans())
def test_what_is_waited_for_comes(
    script: list[tuple[str, int, int]], at_start: bool, every: int, union: bool
) -> None:
    naive = connected(StreamOptions("toy", at_start=at_start, every=every, union=union))
    for step, mask, seed in script:
        if step != "expire":
            getattr(naive, step)(mask, seed)
        if naive.book is not None:
            assert not any(naive.session.outdated(handle) for handle in naive.record)
            assert not union or not naive.session.union_outdated()
