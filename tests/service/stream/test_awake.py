"""A busy loop does not sleep, runs what must stay warm, and sleeps again soon after."""

from __future__ import annotations

import asyncio
import os

import pytest

from service.stream.awake import Awake

pytestmark = pytest.mark.anyio

SECONDS = 0.01


class Turns:
    """Counts how often something was kept warm."""

    def __init__(self) -> None:
        self.warmed = 0

    def warm(self) -> None:
        self.warmed += 1


async def spinning(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop has something to do at once, beside us."""
    await asyncio.sleep(0)
    return bool(loop._ready)  # type: ignore[attr-defined]


async def test_it_is_awake_for_as_long_as_asked_and_warm_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    loop, turns = asyncio.get_running_loop(), Turns()
    awake = Awake(loop, SECONDS, turns.warm)
    assert not await spinning(loop)
    awake.stay()
    awake.stay()
    assert await spinning(loop)
    await asyncio.sleep(3 * SECONDS)
    assert turns.warmed > 0
    assert not await spinning(loop)
    awake.stay()
    assert await spinning(loop)


@pytest.mark.parametrize(("seconds", "cores"), [(0.0, 8), (SECONDS, 1)], ids=["not asked", "one core"])
async def test_it_sleeps(monkeypatch: pytest.MonkeyPatch, seconds: float, cores: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    loop, turns = asyncio.get_running_loop(), Turns()
    Awake(loop, seconds, turns.warm).stay()
    assert not await spinning(loop)
    assert turns.warmed == 0
