"""The stream for a decode loop that is not asynchronous: routing goes in as it happens, forecasts come back.

with Stream(model="gpt-oss-20b", top_n=8) as stream:
    sequence = stream.open()
    stream.start([sequence], [976])
    forecast = stream.wait(sequence, timeout_ms=1)
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from specmoe_client.client import PATIENT_TIMEOUT_MS
from specmoe_client.failures import OnFailure
from specmoe_client.streaming.conversation import Conversation
from specmoe_client.streaming.forecasts import SequenceForecast, UnionForecast

DEFAULT_WAIT_MS = 1.0


class Stream(Conversation):
    __doc__ = Conversation.__doc__

    def ready(self, *, timeout_ms: float = PATIENT_TIMEOUT_MS) -> bool:
        """Whether the stream is connected, or gets so in time. If not, the reason is in `last_failure`.

        Raises RequestRefused where the service refuses the stream: no such model or version, wrong options.
        """
        end_s = time.monotonic() + timeout_ms / 1000
        with self._lock:
            self._receive()
            if self.wanted():
                self._keeper.hurry()
            while self.wanted() and not self.over() and time.monotonic() < end_s:
                self._keeper.changed.wait(end_s - time.monotonic())
            return self._is_ready()

    def wait(
        self, sequence: int, timeout_ms: float = DEFAULT_WAIT_MS, *, on_failure: OnFailure = "none"
    ) -> SequenceForecast | None:
        """The newest forecast that is as new as what was told, or as was asked for.

        None, with the reason in `last_failure`, where it does not come in time, or cannot; with
        on_failure="raise" that is raised. None without a reason where no forecast was due in this token.
        """
        return self._wait(sequence, timeout_ms, on_failure)  # type: ignore[return-value]

    def wait_union(
        self, timeout_ms: float = DEFAULT_WAIT_MS, *, on_failure: OnFailure = "none"
    ) -> UnionForecast | None:
        """The union that the newest message made due. Fails as `wait` does."""
        return self._wait(None, timeout_ms, on_failure)  # type: ignore[return-value]

    def close(self) -> None:
        """End the stream and its thread."""
        self._shut()
        self._keeper.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(
        self, sequence: int | None, timeout_ms: float, on_failure: OnFailure
    ) -> SequenceForecast | UnionForecast | None:
        end_s = time.perf_counter() + timeout_ms / 1000
        with self._lock:
            self._insist(sequence)
            while True:
                self._receive()
                wanted, newest = self._wanted(sequence)
                if not wanted:
                    return newest
                left_s = end_s - time.perf_counter()
                if left_s <= 0 or self._link is None or not self._can_come(sequence):
                    self._in_vain(sequence, timeout_ms, on_failure)
                    return None
                self._link.wait(left_s)
