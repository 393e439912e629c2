"""Both streams behind one face, so that each test of behaviour holds for both."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from specmoe_client import AsyncStream, Stream

# Long enough for any machine, and only ever waited for where a test fails.
PATIENCE_S = 10.0


class AwaitedStream:
    """An AsyncStream driven by its own event loop from a test that is none, under the names of Stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()

        async def make() -> AsyncStream:
            return AsyncStream(*args, **kwargs)

        try:
            self._stream = self._runner.run(make())
        except BaseException:
            self._runner.close()
            raise

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(
            self._stream, {"wait": "forecast", "wait_union": "forecast_union"}.get(name, name)
        )
        if not inspect.iscoroutinefunction(attribute):
            return attribute
        return lambda *args, **kwargs: self._runner.run(attribute(*args, **kwargs))

    def close(self) -> None:
        if self._stream.status.state != "closed":
            self._runner.run(self._stream.aclose())
            self._runner.close()


@pytest.fixture(params=[Stream, AwaitedStream], ids=["sync", "async"])
def open_stream(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes streams of one kind and closes them after the test."""
    opened: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        stream = request.param(*args, **{"model": "toy", **kwargs})
        opened.append(stream)
        return stream

    yield make
    for stream in opened:
        stream.close()


def until(condition: Callable[[], Any]) -> Any:
    """What the condition gives, once that is something."""
    end_s = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end_s, "it never happened"
        time.sleep(0.002)
    return found
