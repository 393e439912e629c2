"""Keeping an event loop from sleeping for a while: it looks at its sockets again and again instead.

On a virtual machine, a core that slept took 50 µs longer for the next model call, and for the rest as well.

SPECMOE_STREAM_SPIN_US=1000 specmoe serve
"""

from __future__ import annotations

import asyncio
import time


class Awake:
    """seconds: how long after the last call of `stay`; 0: not at all."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop, self._seconds = loop, seconds
        self._until, self._spins = 0.0, False

    def stay(self) -> None:
        """Something happened, and more is likely to."""
        if self._seconds:
            self._until = time.perf_counter() + self._seconds
            if not self._spins:
                self._spins = True
                self._loop.call_soon(self._spin)

    def _spin(self) -> None:
        self._spins = time.perf_counter() < self._until
        if self._spins:
            self._loop.call_soon(self._spin)
