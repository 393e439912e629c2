"""When to try again, and when to stop waiting: what turns a dead service into "no prediction" at once.

keeper.py -> Pauses, between connections; conversation.py -> Patience, while there is one
"""

from __future__ import annotations

import random

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
# A connection that held so long was a good one: the next failure is a new story.
STABLE_S = 10.0
# Waits in vain, in a row and without a single byte from the service, after which waiting is of no use.
VAIN_WAITS = 8


class Pauses:
    """How long to wait before connecting again: doubling, at random so that not all come at once."""

    def __init__(self) -> None:
        self._longest_s = FIRST_PAUSE_S

    def next_s(self) -> float:
        """Seconds before the next attempt."""
        pause_s = random.uniform(0.5, 1.0) * self._longest_s  # noqa: S311  # no secret
        self._longest_s = min(LONGEST_PAUSE_S, 2 * self._longest_s)
        return pause_s

    def lived(self, seconds: float) -> None:
        """A connection is over after so long."""
        if seconds >= STABLE_S:
            self._longest_s = FIRST_PAUSE_S


class Patience:
    """A circuit breaker: exhausted by waits in vain, restored by anything the service says."""

    def __init__(self) -> None:
        self._vain = 0

    @property
    def exhausted(self) -> bool:
        """Whether waiting is of no use."""
        return self._vain >= VAIN_WAITS

    def lose(self) -> None:
        """A wait ended without a forecast."""
        self._vain += 1

    def restore(self) -> None:
        """The service said something."""
        self._vain = 0
