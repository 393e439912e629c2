"""Which tokens are scored, or learned from, and their forecasts until the routing came: the truth for them.

Hub -> Scoring: begin, keep, finish -> LiveScores, and clients whose coverage adapts

.venv/bin/python -m pytest tests/service/stream/test_conversation.py
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Integer

from speculation.live import LiveScores

# Tokens whose forecasts are kept at the same time: 24 forecasts of 3 kB each, for gpt-oss-20b.
MOST_TOKENS = 64
# Room that those which are learned from alone leave to those that are scored.
MOST_LEARNED = MOST_TOKENS // 2

Kept = list[tuple[int, np.ndarray[Any, Any]]]
Routed = np.ndarray[Any, Any]


class Learner(Protocol):
    """A client. adapts: whether it is to be told how its forecasts turned out."""

    @property
    def adapts(self) -> bool: ...

    def learn(self, forecasts: Kept, routing: Integer[np.ndarray, "L K"]) -> None: ...


@dataclass(slots=True)
class Followed:
    """A token and its forecasts so far. scored: for the report. learner: who learns from it, if anybody."""

    scored: bool
    learner: Learner | None
    kept: Kept = field(default_factory=list)


class Scoring:
    """share: of the tokens that are scored. Of adapting clients, all are followed for which there is room."""

    def __init__(self, scores: LiveScores, share: float) -> None:
        self._scores, self._share = scores, share
        self._followed: dict[int, Followed] = {}
        self._to_score: deque[tuple[Kept, Routed]] = deque()
        self._to_learn: deque[tuple[Learner, Kept, Routed]] = deque()

    @property
    def waits(self) -> bool:
        """Whether finished tokens are still to be scored, or learned from."""
        return bool(self._to_score or self._to_learn)

    @property
    def presses(self) -> bool:
        """Whether so many wait that a busy loop, too, must score some: no new ones could be kept soon."""
        return len(self._to_score) >= MOST_TOKENS // 2

    def begin(self, row: int, client: Learner | None) -> None:
        """A token of this client begins, which may be one that is followed."""
        self.forget(row)
        following = len(self._followed) + len(self._to_score) + len(self._to_learn)
        learner = client if client is not None and client.adapts and following < MOST_LEARNED else None
        room = following < MOST_TOKENS
        scored = room and random.random() < self._share  # noqa: S311  # a sample, no secret
        if scored or learner is not None:
            self._followed[row] = Followed(scored, learner)

    def keep(self, rows: Iterable[int], seen: int, probabilities: Float32[np.ndarray, "n L E"]) -> None:
        """Forecasts that were made after so many layers."""
        if not self._followed:
            return
        for row, of_row in zip(rows, probabilities, strict=True):
            token = self._followed.get(row)
            # `ask` may repeat a forecast: each distance counts once a token.
            if token is not None and (not token.kept or token.kept[-1][0] < seen):
                token.kept.append((seen, of_row.copy()))

    def finish(self, row: int, routing: Integer[np.ndarray, "L K"]) -> None:
        """The token has ended, routed like this."""
        token = self._followed.pop(row, None)
        if token is None or not token.kept:
            return
        routing = routing.copy()
        if token.scored:
            self._to_score.append((token.kept, routing))
        if token.learner is not None:
            self._to_learn.append((token.learner, token.kept, routing))

    def forget(self, row: int) -> None:
        """The token will not be finished."""
        self._followed.pop(row, None)

    def score_one(self) -> None:
        """One finished token, if there is one: it takes as long as a forecast."""
        if self._to_score:
            self._scores.add(*self._to_score.popleft())

    def learn_from_one(self) -> None:
        """Likewise. It should not wait for a quiet moment: sets are to be those of the token that follows."""
        if self._to_learn:
            learner, kept, routing = self._to_learn.popleft()
            learner.learn(kept, routing)
