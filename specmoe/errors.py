"""Errors of the commands themselves; those of a room come from the room.

SpecMoEError
├── BenchError     what is to be measured does not start or does not answer
│   └── BadAnswer  it answers otherwise than it should
└── ReplayError    the trace, the service and the flags of `specmoe replay` do not fit together
"""

from __future__ import annotations

from traces.errors import SpecMoEError


class BenchError(SpecMoEError):
    """Nothing can be measured, or what was measured is not what it should be."""


class BadAnswer(BenchError):
    """A server that is being measured did not answer as it should."""

    def __init__(self, message: str) -> None:
        super().__init__(message, remedy="Check that it is of the same release as this command.")


class ReplayError(SpecMoEError):
    """The replay cannot be started, or the service refuses its questions."""
