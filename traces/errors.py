"""The root of every error this project raises on purpose, and the tree of this room.

    SpecMoEError
    └── TraceError            a trace file or a trace in memory is not what it must be
        └── TraceFormatError  the file cannot be read as the format it claims to be

A leaf like `traces.spec`: every room may import it. A message says what came and what was expected; the
remedy says what to do.
"""


class SpecMoEError(Exception):
    """Something the user can mend. `message`: what came and what was expected; `remedy`: what to do."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(f"{message} {remedy}")
        self.message = message
        self.remedy = remedy


class TraceError(SpecMoEError):
    """A routing trace is not what it must be."""


class TraceFormatError(TraceError):
    """A file cannot be read as the trace format it claims to be."""
