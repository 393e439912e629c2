"""Tokens on their way into history: those that were just finished, and pasts that were told.

Hub.tell, Hub.add_history -> History -> Slots.advance

A finished token is still in its row, and is taken from there. A past is told in many tokens, which wait here
and are taken in a few a tick, so that a long one does not hold up everybody else's forecasts.

.venv/bin/python -m pytest tests/service/stream/test_conversation.py
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Int64, Integer

from service.errors import ContextTooLong
from service.settings import Settings
from speculation.slots import Slots

# Rows that are taken in at once: some 100 µs for one sequence, 300 µs for so many.
ROWS = 32
# Tokens of all sequences that may wait: some 40 MB for gpt-oss-20b.
MAX_WAITING_TOKENS = 1 << 16

# (id, experts [L, K], gates [L, K])
Token: TypeAlias = tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]


class History:
    """What of each row is not history yet."""

    def __init__(self, slots: Slots, settings: Settings) -> None:
        self._slots = slots
        self._most_tokens = settings.max_context_tokens
        self._batch_rows = settings.stream_batch_rows
        self._finished: dict[int, None] = {}
        self._told: dict[int, deque[Token]] = {}

    @property
    def waits(self) -> bool:
        """Whether pasts are still to be taken in."""
        return bool(self._told)

    def delays(self, rows: Iterable[int]) -> bool:
        """Whether one of these rows must wait for its past."""
        return bool(self._told) and any(row in self._told for row in rows)

    def add(
        self,
        row: int,
        token_ids: Int64[np.ndarray, "T"],
        experts: Integer[np.ndarray, "T L K"],
        gates: Float32[np.ndarray, "T L K"] | None,
    ) -> None:
        """Finished tokens that were told. Raises ContextTooLong."""
        self._check_room(row, len(token_ids))
        self.settle([row])
        if gates is None:
            gates = np.ones(experts.shape, np.float32)
        self._told.setdefault(row, deque()).extend(zip(token_ids.tolist(), experts, gates, strict=True))

    def finish(self, row: int) -> None:
        """The row's current token has all its layers."""
        if row in self._told:
            self._told[row].append(self._slots.finished(row))
        else:
            self._finished[row] = None

    def forget(self, row: int) -> None:
        """The sequence is closed."""
        self._finished.pop(row, None)
        self._told.pop(row, None)

    def settle(self, rows: Iterable[int]) -> None:
        """What is finished of these rows must be history before their next token overwrites it."""
        if any(row in self._finished for row in rows):
            self.take_finished()

    def take_finished(self) -> bool:
        """All finished tokens become history. Whether there were any."""
        if not self._finished:
            return False
        rows = list(self._finished)
        self._finished.clear()
        for first in range(0, len(rows), self._batch_rows):
            self._slots.advance(np.array(rows[first : first + self._batch_rows]))
        return True

    def take_some_told(self) -> None:
        """One token of as many sequences as may be, those first that had no turn for longest."""
        if not self._told:
            return
        rows = list(itertools.islice(self._told, ROWS))
        token_ids, experts, gates = zip(*(self._told[row].popleft() for row in rows), strict=True)
        self._slots.advance_with(np.array(rows), np.array(token_ids), np.stack(experts), np.stack(gates))
        for row in rows:
            left = self._told.pop(row)
            if left:
                self._told[row] = left

    def _check_room(self, row: int, count: int) -> None:
        of_row, of_all = len(self._told.get(row, ())), sum(map(len, self._told.values()))
        if of_row + count > self._most_tokens:
            raise ContextTooLong(
                f"{of_row + count} context tokens of a sequence wait to be taken in, "
                f"at most {self._most_tokens} are allowed.",
                remedy="Send the last tokens only: what is far back says little.",
            )
        if of_all + count > MAX_WAITING_TOKENS:
            raise ContextTooLong(
                f"{of_all + count} context tokens of all sequences wait to be taken in, "
                f"at most {MAX_WAITING_TOKENS} are allowed.",
                remedy="Send the contexts of fewer sequences at a time, or shorter ones.",
            )
