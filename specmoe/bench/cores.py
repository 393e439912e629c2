"""Which cores the server and the load run on: they must not take each other's time.

specmoe bench --quick
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cores:
    """One core for what is measured, another one for the load. None: the system decides."""

    server: int | None
    client: int | None


def choose_cores() -> Cores:
    """Two cores of those this process may use, where the system can pin and there are two."""
    if not hasattr(os, "sched_getaffinity"):
        return Cores(None, None)
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        return Cores(None, None)
    server = allowed[0]
    apart = [core for core in allowed[1:] if core not in siblings(server)]
    return Cores(server, (apart or allowed[1:])[0])


def pin(core: int | None) -> None:
    """Keep this process, and those it starts, on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Pinned until the block ends."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    pin(core)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def siblings(core: int) -> set[int]:
    """Logical cores that are the same piece of hardware as this one, by the kernel's word."""
    path = TOPOLOGY / f"cpu{core}" / "topology" / "threadsiblings_list"
    try:
        return core_list(path.read_text(encoding="ascii"))
    except OSError:
        return {core}


def core_list(text: str) -> set[int]:
    """The kernel's way to write a set of cores: `0,4-6`."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
