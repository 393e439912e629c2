"""How long something took, again and again: times gathered, percentiles read off them.

measured calls -> Latency -> `specmoe.bench.report`

specmoe bench --quick
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

# Calls of one contender before the next has its turn: what disturbs the machine for longer disturbs them all.
BLOCK = 8
# The first calls fill caches and allocate.
WARM_UP_CALLS = 10


class Latency:
    """Times of one thing, in microseconds, and the seconds in which so many were done."""

    def __init__(self) -> None:
        self._times_us: list[float] = []
        self._seconds = 0.0

    def add(self, times_us: Iterable[float], seconds: float) -> None:
        """What one round brought. seconds: its length, in which they may have been done side by side."""
        self._times_us.extend(times_us)
        self._seconds += seconds

    def __len__(self) -> int:
        return len(self._times_us)

    def percentile_us(self, share: float) -> float:
        """A measured time, none in between: the smallest that `share` percent do not exceed, rounded up."""
        return float(np.percentile(self._times_us, share, method="higher"))

    @property
    def per_second(self) -> float:
        """How many were done in a second."""
        return len(self._times_us) / self._seconds

    def report(self) -> dict[str, float]:
        """Fit for JSON; nothing of nothing."""
        if not self._times_us:
            return {}
        return {
            "p50_us": round(self.percentile_us(50), 2),
            "p99_us": round(self.percentile_us(99), 2),
            "calls": len(self._times_us),
            "per_second": round(self.per_second, 1),
        }


def measure(contenders: Sequence[tuple[Callable[[int], Any], Latency]], seconds: float) -> None:
    """Call the contenders in short turns for `seconds` in all. A call gets its number, to vary its input."""
    end = time.perf_counter() + seconds
    number = 0
    while time.perf_counter() < end:
        for call, latency in contenders:
            times_us = [_timed_us(call, number + offset) for offset in range(BLOCK)]
            latency.add(times_us, sum(times_us) / 1e6)
        number += BLOCK


def warm_up(call: Callable[[int], Any]) -> None:
    """Calls that nobody times."""
    for number in range(WARM_UP_CALLS):
        call(number)


def _timed_us(call: Callable[[int], Any], number: int) -> float:
    began = time.perf_counter_ns()
    call(number)
    return (time.perf_counter_ns() - began) / 1e3
