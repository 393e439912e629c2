"""Keeping an event loop, and the predictor, from falling asleep: while streams are busy, the loop looks at
its sockets again and again, and makes up a token every now and then.

On a virtual machine, a core that slept took 50 µs longer for the next model call, and for the rest as well.
And what nobody touches for a few milliseconds leaves the caches, which other programs share: the graphs that
run once a token then took 200 µs instead of 30. A machine's only core is left to the others, though: the
client may be among them.

SPECMOE_STREAM_SPIN_US=0 specmoe serve
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

# Between two calls of `warm`, which runs one of three graphs: each has its turn every millisecond.
WARM_S = 0.35e-3
# Rounds of the loop in which nothing came before it counts as waiting: a busy loop has no time for it.
IDLE_ROUNDS = 2


class Awake:
    """seconds: how long after the last call of `stay`; 0: not at all. warm: called again and again then,
    while nothing comes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, warm: Callable[[], None]) -> None:
        self._loop, self._warm = loop, warm
        self._seconds = seconds if (os.cpu_count() or 1) > 1 else 0.0
        self._until = self._warm_at = 0.0
        self._spins = False
        self._idle = 0

    def stay(self) -> None:
        """Something happened, and more is likely to."""
        self._idle = 0
        if self._seconds:
            self._until = time.perf_counter() + self._seconds
            if not self._spins:
                self._spins = True
                self._warm_at = time.perf_counter() + WARM_S
                self._loop.call_soon(self._spin)

    def _spin(self) -> None:
        now = time.perf_counter()
        self._idle += 1
        if now >= self._warm_at and self._idle > IDLE_ROUNDS:
            self._warm()
            self._warm_at = time.perf_counter() + WARM_S
        self._spins = now < self._until
        if self._spins:
            self._loop.call_soon(self._spin)
