"""From a version in the store to one that may serve: read, verified, warmed up, its golden answer checked.

store -> `Loader.get` -> Running -> `service.serving`

.venv/bin/python -m pytest tests/service/test_serving.py
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np

from model_store.errors import StoreUnavailable, VersionNotFound
from model_store.store import Store
from service.device import choose
from service.errors import VersionRefused
from service.metrics import Metrics, VersionMetrics
from service.settings import Settings
from speculation.golden import check_golden
from speculation.runtime import Speculator
from traces.errors import SpecMoEError

# The first call of a batch size allocates; these are the ones of a decode loop.
WARM_UP_BATCHES = (1, 8, 32)
# A version found unfit is not read again for so long, however often it is asked for.
REFUSED_FOR_SECONDS = 30.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Running:
    """A version in memory that passed its golden check."""

    model: str
    version: int
    speculator: Speculator
    provider_reason: str
    load_seconds: float
    metrics: VersionMetrics


class Loader:
    """Brings versions into memory one at a time, on its own thread, each once however many ask for it."""

    def __init__(self, store: Store, settings: Settings, metrics: Metrics) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, "store")
        self._under_way: dict[tuple[str, int], asyncio.Task[Running]] = {}
        self._refused: dict[tuple[str, int], tuple[VersionRefused, float]] = {}

    async def read(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Something that asks the store and so may block."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: function(*arguments, **named)
        )

    async def get(self, model: str, version: int) -> Running:
        """The version, fit to serve. Raises VersionRefused, VersionNotFound, StoreUnavailable."""
        self._raise_if_refused(model, version)
        key = (model, version)
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._load(model, version))
            task.add_done_callback(lambda done: self._forget(key, done))
        # A caller that gives up leaves the load to the others who wait for it.
        return await asyncio.shield(task)

    def refusal(self, model: str, version: int) -> str | None:
        """Why the version was found unfit, if it was."""
        refused = self._refused.get((model, version))
        return refused[0].message if refused else None

    def close(self) -> None:
        """Wait until the thread is done."""
        self._thread.shutdown()

    async def _load(self, model: str, version: int) -> Running:
        try:
            running = await self.read(_load, self._store, self._settings, self._metrics, model, version)
        except (StoreUnavailable, VersionNotFound):
            raise
        except Exception as error:  # ONNX Runtime's errors share no base, and none of them may serve
            refused = _refusal(model, version, error)
            self._refused[model, version] = (refused, time.monotonic())
            self._metrics.refused_loads.labels(model).inc()
            raise refused from error
        self._refused.pop((model, version), None)
        return running

    def _forget(self, key: tuple[str, int], done: asyncio.Task[Running]) -> None:
        del self._under_way[key]
        if not done.cancelled():
            done.exception()  # seen here where every caller has given up

    def _raise_if_refused(self, model: str, version: int) -> None:
        refused = self._refused.get((model, version))
        if refused and time.monotonic() - refused[1] < REFUSED_FOR_SECONDS:
            # Made anew: an error that is raised again and again gathers a traceback without end.
            raise VersionRefused(refused[0].message, remedy=refused[0].remedy)


def _load(store: Store, settings: Settings, metrics: Metrics, model: str, version: int) -> Running:
    began = time.perf_counter()
    stored = store.load(model, version)
    speculator, provider_reason = choose(stored, settings)
    del stored  # 11 MB of graphs, for the bundled versions
    check_golden(speculator)
    _warm_up(speculator)
    _give_memory_back()
    return Running(
        model=model,
        version=version,
        speculator=speculator,
        provider_reason=provider_reason,
        load_seconds=round(time.perf_counter() - began, 3),
        metrics=metrics.of_version(model, version),
    )


def _warm_up(speculator: Speculator) -> None:
    spec = speculator.spec
    for batch in WARM_UP_BATCHES:
        nothing_seen = np.full((batch, spec.num_layers, spec.top_k), -1, np.int32)
        speculator.predict(speculator.initial_state(batch), None, nothing_seen, None)


def _give_memory_back() -> None:
    """Loading a graph takes three times its size for a moment, and glibc keeps what it got unless asked."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _refusal(model: str, version: int, error: Exception) -> VersionRefused:
    why = error.message if isinstance(error, SpecMoEError) else f"{type(error).__name__}: {error}"
    return VersionRefused(
        f"{model} version {version} is refused: {why}",
        remedy=error.remedy if isinstance(error, SpecMoEError) else "Export and publish it again.",
    )
