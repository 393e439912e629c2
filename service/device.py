"""Where a version runs: on what is fastest for it, by measurement. Small models are often faster on a CPU.

StoredVersion, settings -> `choose` -> a Speculator and why it is this one

.venv/bin/python -m pytest tests/service/test_device.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from model_store.store import StoredVersion
from service.settings import Settings
from speculation.errors import ProviderUnavailable
from speculation.runtime import Speculator

# Of each provider: the first ones allocate and compile, the others are timed.
WARM_UP_CALLS = 5
TIMED_CALLS = 20


def choose(stored: StoredVersion, settings: Settings) -> tuple[Speculator, str]:
    """The version on the provider that the settings want, and why. Raises what `Speculator` raises."""
    threads = settings.model_threads
    if settings.provider != "auto":
        return Speculator(stored, provider=settings.provider, threads=threads), "set by SPECMOE_PROVIDER"
    cpu = Speculator(stored, provider="cpu", threads=threads)
    try:
        cuda = Speculator(stored, provider="cuda", threads=threads)
    except ProviderUnavailable:
        return cpu, "no GPU that works here"
    return fastest([cpu, cuda], call_us)


def fastest(
    candidates: Sequence[Speculator], time_us: Callable[[Speculator], float]
) -> tuple[Speculator, str]:
    """The one whose call takes least, and all times in words."""
    times = [(time_us(candidate), candidate) for candidate in candidates]
    told = ", ".join(f"{candidate.provider} {taken:.0f} µs" for taken, candidate in times)
    return min(times, key=lambda timed: timed[0])[1], f"fastest for one sequence: {told}"


def call_us(speculator: Speculator) -> float:
    """Median microseconds of a prediction for one sequence at the start of a token."""
    spec = speculator.spec
    state = speculator.initial_state(1)
    nothing_seen = np.full((1, spec.num_layers, spec.top_k), -1, np.int32)
    times = []
    for _ in range(WARM_UP_CALLS + TIMED_CALLS):
        began = time.perf_counter()
        speculator.predict(state, None, nothing_seen, None)
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times[WARM_UP_CALLS:])
