"""What a benchmark is made of: parts, each measured with some effort and reported by itself.

specmoe bench --only stream
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Effort:
    """How long it takes, and so how sure it is.

    model_seconds: for each case and batch size; rounds, round_seconds: how often every contender has its
    turn, and for how long; sequences: whose memory is measured.
    """

    model_seconds: float
    rounds: int
    round_seconds: float
    sequences: int


# Some four minutes, enough for thousands of calls each; and a few seconds, which only tell that all runs.
FULL = Effort(model_seconds=2.0, rounds=14, round_seconds=0.4, sequences=10_000)
QUICK = Effort(model_seconds=0.05, rounds=2, round_seconds=0.05, sequences=100)


class Part(Protocol):
    """One of them. Closing what `run` gave stops what it started."""

    def steps(self, effort: Effort) -> int:
        """How many times `run` will yield."""

    def run(self, effort: Effort) -> Generator[str]:
        """Measure; yields the name of what is measured next. Raises BenchError."""

    def report(self) -> Any:
        """What there is by now, fit for JSON; empty where there is nothing."""
