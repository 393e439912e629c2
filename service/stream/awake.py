"""Keeping an event loop from sleeping for a while: it looks at its sockets again and again instead.

On a virtual machine, a core that slept took 50 µs longer for the next model call, and for the rest as well. A
machine's only core is left to the others, though: the client may be among them.

SPECMOE_STREAM_SPIN_US=0 specmoe serve
"""

from __future__ import annotations

import asyncio
import os
import time


class Awake:
    """seconds: how long after the last call of `stay`; 0: not at all."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds if (os.cpu_count() or 1) > 1 else 0.0
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
