"""Errors of the commands themselves; those of a room come from the room.

SpecMoEError
└── ReplayError    the trace, the service and the flags of `specmoe replay` do not fit together
"""

from __future__ import annotations

from traces.errors import SpecMoEError


class ReplayError(SpecMoEError):
    """The replay cannot be started, or the service refuses its questions."""
