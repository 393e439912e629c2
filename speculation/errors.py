"""What can go wrong when a version is run, as one tree.

SpecMoEError
└── SpeculationError
    ├── InputInvalid         an array or an option of the caller is not what it must be
    ├── CoverageUnknown      no coverage table answers the question
    ├── OutlookUnknown       the version has no graph that tells of later tokens
    ├── ProviderUnavailable  the accelerator asked for does not work here
    ├── GraphFailed          a graph stopped at what it was given
    └── GraphRefused         a version's graphs are not what its manifest promises
        └── GoldenMismatch   it runs, but answers otherwise than when it was published
"""

from __future__ import annotations

from traces.errors import SpecMoEError


class SpeculationError(SpecMoEError):
    """A version cannot be run, or not with these inputs."""


class InputInvalid(SpeculationError):
    """An array or an option of the caller is not what it must be."""


class CoverageUnknown(SpeculationError):
    """No coverage table answers the question."""


class OutlookUnknown(SpeculationError):
    """The version has no graph that tells which experts later tokens will use."""


class ProviderUnavailable(SpeculationError):
    """The accelerator asked for does not work here."""


class GraphFailed(SpeculationError):
    """A graph stopped at what it was given: an index beyond a table, out of a state that is none."""


class GraphRefused(SpeculationError):
    """A version's graphs are not what its manifest promises."""


class GoldenMismatch(GraphRefused):
    """It runs, but answers otherwise than when it was published."""
