"""Errors of the commands themselves; those of a room come from the room.

SpecMoEError
├── BenchError     what is to be measured does not start or does not answer
└── ReplayError    the trace, the service and the flags of `specmoe replay` do not fit together
"""

from __future__ import annotations

from traces.errors import SpecMoEError


class BenchError(SpecMoEError):
    """Nothing can be measured, or what was measured is not what it should be."""


class ReplayError(SpecMoEError):
    """The replay cannot be started, or the service refuses its questions."""
