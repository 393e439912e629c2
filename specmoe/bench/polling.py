"""Which sockets have something to read, looked for again and again: a load that slept would add its waking.

load, stream_load -> awaited -> selectors

specmoe bench --only stream
"""

from __future__ import annotations

import selectors
import time

from specmoe.bench.stream_client import ANSWER_SECONDS
from specmoe.errors import BadAnswer


def awaited(selector: selectors.BaseSelector, *, asleep: bool = False) -> list[selectors.SelectorKey]:
    """The keys of those that can be read, at least one. Raises BadAnswer where none is for ten seconds.

    asleep: wait for the system to wake this process, as most clients do.
    """
    late = time.monotonic() + ANSWER_SECONDS
    while not (ready := selector.select(ANSWER_SECONDS if asleep else 0)):
        if time.monotonic() >= late:
            raise BadAnswer(f"no answer within {ANSWER_SECONDS:g} s")
    return [key for key, _ in ready]
