"""Which device a version runs on: the one that is measured to be faster, and the reason is told.

.venv/bin/python -m pytest tests/service/test_device.py
"""

from __future__ import annotations

import pytest

from service.device import call_us, choose, fastest
from service.settings import Settings
from speculation.runtime import Speculator
from tests.toy_version import toy_stored


@pytest.mark.parametrize("slow", [0, 1], ids=["the second is faster", "the first is faster"])
def test_the_faster_one_is_chosen_and_all_times_are_told(slow: int) -> None:
    candidates = [Speculator(toy_stored(), provider="cpu") for _ in range(2)]
    chosen, reason = fastest(candidates, lambda one: 250.0 if one is candidates[slow] else 40.0)
    assert chosen is candidates[1 - slow]
    assert "40 µs" in reason and "250 µs" in reason


def test_a_provider_that_was_asked_for_is_not_measured() -> None:
    speculator, reason = choose(toy_stored(), Settings(provider="cpu"))
    assert (speculator.provider, reason) == ("cpu", "set by SPECMOE_PROVIDER")


def test_a_call_takes_some_time() -> None:
    assert call_us(Speculator(toy_stored(), provider="cpu")) > 0
