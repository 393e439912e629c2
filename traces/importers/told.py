"""What the command line tells an importer about a dump that does not say it itself, and what comes back.

    specmoe traces import responses.jsonl --out traces/ --num-experts 128

`traces.importers.formats` hands `Told` to a format's reader and gets `Imported` back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from traces.errors import TraceFormatError
from traces.trace import RoutingTrace


@dataclass(frozen=True)
class Told:
    """None where nothing was told.

    model: the model's name. num_experts: E. num_layers: layers of the dump, dense ones too. top_k: K.
    micro_batch: sequences of a training micro-batch.
    """

    model: str | None = None
    num_experts: int | None = None
    num_layers: int | None = None
    top_k: int | None = None
    micro_batch: int | None = None


@dataclass(frozen=True)
class Imported:
    """A trace, and what to tell of it.

    notes: how often something was left out or odd, keyed by a sentence that goes on after the number.
    layers: the dump's own numbers of the trace's layers; none where it has none. dense: of layers without
    routing, which the trace does not count.
    """

    trace: RoutingTrace
    notes: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()


def needed(path: Path, value: int | None, what: str, option: str) -> int:
    """The number that was told. Raises TraceFormatError naming the option that tells it."""
    if value is None:
        raise TraceFormatError(f"{path} does not say {what}.", remedy=f"Tell it: {option} N.")
    if value < 1:
        raise TraceFormatError(f"{option} is {value}, expected 1 or more.", remedy="Correct it.")
    return value
