"""Which tokens are scored, and their forecasts until the routing came: the truth for them.

Hub -> Scoring: begin, keep, finish -> LiveScores

.venv/bin/python -m pytest tests/service/stream/test_conversation.py
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer

from speculation.live import LiveScores

# Tokens whose forecasts are kept at the same time: 24 forecasts of 3 kB each, for gpt-oss-20b.
MOST_TOKENS = 64

Kept = list[tuple[int, np.ndarray[Any, Any]]]


class Scoring:
    """share: of the tokens that are scored."""

    def __init__(self, scores: LiveScores, share: float) -> None:
        self._scores, self._share = scores, share
        self._kept: dict[int, Kept] = {}
        self._to_score: deque[tuple[Kept, np.ndarray[Any, Any]]] = deque()

    @property
    def waits(self) -> bool:
        """Whether finished tokens are still to be scored."""
        return bool(self._to_score)

    @property
    def presses(self) -> bool:
        """Whether so many wait that a busy loop, too, must score some: no new ones could be kept soon."""
        return len(self._to_score) >= MOST_TOKENS // 2

    def begin(self, row: int) -> None:
        """A token begins, which may be one that is scored."""
        self.forget(row)
        room = len(self._kept) + len(self._to_score) < MOST_TOKENS
        if room and random.random() < self._share:  # noqa: S311  # a sample, no secret
            self._kept[row] = []

    def keep(self, rows: Iterable[int], seen: int, probabilities: Float32[np.ndarray, "n L E"]) -> None:
        """Forecasts that were made after so many layers."""
        if not self._kept:
            return
        for row, of_row in zip(rows, probabilities, strict=True):
            kept = self._kept.get(row)
            # `ask` may repeat a forecast: each distance counts once a token.
            if kept is not None and (not kept or kept[-1][0] < seen):
                kept.append((seen, of_row.copy()))

    def finish(self, row: int, routing: Integer[np.ndarray, "L K"]) -> None:
        """The token has ended, routed like this."""
        kept = self._kept.pop(row, None)
        if kept:
            self._to_score.append((kept, routing.copy()))

    def forget(self, row: int) -> None:
        """The token will not be finished."""
        self._kept.pop(row, None)

    def score_one(self) -> None:
        """One finished token, if there is one: it takes as long as a forecast."""
        if self._to_score:
            self._scores.add(*self._to_score.popleft())
