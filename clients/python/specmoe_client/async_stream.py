"""The stream for an asyncio decode loop: as `stream.py`, but a forecast is awaited.

async with AsyncStream(model="gpt-oss-20b", top_n=8) as stream:
    sequence = stream.open()
    stream.start([sequence], [976])
    forecast = await stream.forecast(sequence, timeout_ms=1)

Telling and `latest` do not wait, and are no coroutines. Connecting is left to a thread, as there: looking up
a name, for example, would hold up the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from specmoe_client.client import PATIENT_TIMEOUT_MS
from specmoe_client.failures import OnFailure
from specmoe_client.stream import DEFAULT_WAIT_MS
from specmoe_client.streaming.conversation import Conversation
from specmoe_client.streaming.forecasts import SequenceForecast, UnionForecast
from specmoe_client.streaming.link import Link


class AsyncStream(Conversation):
    """`Stream` for asyncio: the same arguments, forecasts and errors. Made within the loop it belongs to."""

    async def ready(self, *, timeout_ms: float = PATIENT_TIMEOUT_MS) -> bool:
        """Whether the stream is connected, or gets so in time. If not, the reason is in `last_failure`.

        Raises RequestRefused where the service refuses the stream: no such model or version, wrong options.
        """
        end_s = self._loop.time() + timeout_ms / 1000
        with self._lock:
            self._receive()
            if self.wanted():
                self._keeper.hurry()
        while self.wanted() and not self.over() and self._loop.time() < end_s:
            await self._arrival(end_s)
        with self._lock:
            return self._is_ready()

    async def forecast(
        self, sequence: int, timeout_ms: float = DEFAULT_WAIT_MS, *, on_failure: OnFailure = "none"
    ) -> SequenceForecast | None:
        """The newest forecast that is as new as what was told, or as was asked for.

        None, with the reason in `last_failure`, where it does not come in time, or cannot; with
        on_failure="raise" that is raised. None without a reason where no forecast was due in this token.
        """
        return await self._await(sequence, timeout_ms, on_failure)  # type: ignore[return-value]

    async def forecast_union(
        self, timeout_ms: float = DEFAULT_WAIT_MS, *, on_failure: OnFailure = "none"
    ) -> UnionForecast | None:
        """The union that the newest message made due. Fails as `forecast` does."""
        return await self._await(None, timeout_ms, on_failure)  # type: ignore[return-value]

    async def aclose(self) -> None:
        """End the stream and its thread."""
        self._shut()
        await asyncio.to_thread(self._keeper.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _await(
        self, sequence: int | None, timeout_ms: float, on_failure: OnFailure
    ) -> SequenceForecast | UnionForecast | None:
        end_s = self._loop.time() + timeout_ms / 1000
        with self._lock:
            self._insist(sequence)
        while True:
            with self._lock:
                self._receive()
                wanted, newest = self._wanted(sequence)
                if not wanted:
                    return newest
                if self._loop.time() >= end_s or not self._can_come(sequence):
                    self._in_vain(sequence, timeout_ms, on_failure)
                    return None
                self._write_later()
            await self._arrival(end_s)

    async def _arrival(self, end_s: float) -> None:
        """Wait until something came or changed, or it is so late."""
        waiter = self._loop.create_future()
        self._waiters.add(waiter)
        alarm = self._loop.call_at(end_s, _resolve, waiter)
        try:
            await waiter
        finally:
            alarm.cancel()
            self._waiters.discard(waiter)

    def _bind(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiters: set[asyncio.Future[None]] = set()

    def _linked(self, link: Link) -> None:
        self._post(self._watch, link)

    def _unlinked(self, link: Link) -> None:
        if not self._post(self._unwatch, link):
            link.close()

    def _heard(self) -> None:
        if self._waiters:
            self._post(self._wake)

    def _changed(self) -> None:
        super()._changed()
        self._post(self._wake)

    def _post(self, call: Callable[..., None], *arguments: Any) -> bool:
        """Have it called in the loop, from whichever thread. False where the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)
            return True
        return False

    def _watch(self, link: Link) -> None:
        with self._lock:
            if self._link is link:
                self._loop.add_reader(link.fileno(), self._readable)

    def _unwatch(self, link: Link) -> None:
        self._loop.remove_reader(link.fileno())
        self._loop.remove_writer(link.fileno())
        link.close()

    def _readable(self) -> None:
        with self._lock:
            self._receive()

    def _write_later(self) -> None:
        """What the kernel does not take now must be sent while everybody waits."""
        if self._link is not None and self._link.pending:
            self._loop.add_writer(self._link.fileno(), self._writable)

    def _writable(self) -> None:
        with self._lock:
            link = self._link
            self._receive()
            if link is not None and link is self._link and not link.pending:
                self._loop.remove_writer(link.fileno())

    def _wake(self) -> None:
        for waiter in self._waiters:
            _resolve(waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
