"""How long one question may take in all, and whether it is worth asking again.

Pure: it waits for nothing itself. `client.py` and `async_client.py` do the waiting.
"""

from __future__ import annotations

import time
from typing import Any

from specmoe_client.errors import AnswerLate, ClientError, NoPrediction

# A socket with timeout 0 would not wait at all and fail in another way than by timing out.
SHORTEST_WAIT_S = 1e-6
FIRST_PAUSE_S = 0.0005


class Deadline:
    """A moment by which everything must be done: connecting, sending, waiting, reading, asking again.

    Raises ClientError where `timeout_ms` is not a positive number.
    """

    def __init__(self, timeout_ms: float) -> None:
        if not timeout_ms > 0:
            raise ClientError(f"timeout_ms is {timeout_ms}.", remedy="Give a positive number.")
        self.timeout_ms = timeout_ms
        self._end_s = time.perf_counter() + timeout_ms / 1000

    @property
    def left_s(self) -> float:
        """Seconds that are left, negative once it passed."""
        return self._end_s - time.perf_counter()

    def check(self) -> None:
        """Raises AnswerLate once the deadline passed."""
        if self.left_s <= 0:
            raise self.late()

    def late(self) -> AnswerLate:
        """The error to raise when a wait was cut short."""
        return AnswerLate(
            f"No complete answer within {self.timeout_ms:g} ms.",
            remedy="Give more time (timeout_ms), ask for less (layers, top_n), or see the service's load.",
        )


class TimeLeft(dict[str, float]):
    """The transport's timeouts for connecting, sending and reading: each is what is left when it is read.

    Fixed ones would add up to several times the deadline. The header of an answer is one phase to the
    transport: who trickles it byte by byte is cut off by AsyncClient, which has a timer, but not by Client.
    """

    def __init__(self, deadline: Deadline) -> None:
        super().__init__(dict.fromkeys(("connect", "read", "write", "pool"), deadline.left_s))
        self._deadline = deadline

    def get(self, key: str, default: Any = None) -> Any:
        """Seconds left, the same for each phase."""
        return max(self._deadline.left_s, SHORTEST_WAIT_S) if key in self else default


class Attempts:
    """Decides after each failure whether to ask again: only if that can help, and only while time is left."""

    def __init__(self, deadline: Deadline, retries: int) -> None:
        self._deadline = deadline
        self._retries = retries
        self._pause_s = FIRST_PAUSE_S

    def pause_after(self, failure: NoPrediction) -> float:
        """Seconds to wait before the next attempt, doubling. Raises `failure` if none is left."""
        if not failure.retryable or self._retries <= 0 or self._deadline.left_s <= self._pause_s:
            raise failure
        pause_s = self._pause_s
        self._retries -= 1
        self._pause_s *= 2
        return pause_s
