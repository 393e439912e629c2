"""Both clients behind one face, so that each test of behaviour holds for both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from specmoe_client import AsyncClient, Client


class Awaited:
    """An AsyncClient driven by its own event loop from a test that is not asynchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not inspect.iscoroutinefunction(attribute):
            return attribute
        return lambda *args, **kwargs: self._runner.run(attribute(*args, **kwargs))

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


@pytest.fixture(params=[Client, Awaited], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes clients of one kind, with patience unless told otherwise, and closes them after the test."""
    opened = []

    def make(*args: Any, **kwargs: Any) -> Any:
        client = request.param(*args, **{"timeout_ms": 10_000, **kwargs})
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.close()
