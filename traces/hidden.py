"""Hidden states beside a trace: what the router of each layer was given, and the routers themselves.

    FOLDER/part-*.parquet  column `hidden`          FOLDER/routers.npy  weights of all routers
    `specmoe collect --hidden` -> `traces.files.load(folder, hidden=True)` -> RoutingTrace.hidden

They take 2 L H bytes a token, 64 kB for OLMoE, so they are read into an unnamed temporary file (in TMPDIR)
and mapped: what they take of memory is the system's to give and to take back.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32, Int, Int64

from traces.errors import TraceError, TraceFormatError
from traces.spec import RoutingSpec

ROUTERS = "routers.npy"
# What an array's header may take at most.
HEADER_BYTES = 1 << 12


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """states: what the router of each layer was given. routers: of each layer, the weights by which it
    makes logits of that, and last their bias; None where the recording has not kept them."""

    states: Float16[np.ndarray, "N L H"]
    routers: Float32[np.ndarray, "L E H+1"] | None = None

    @property
    def size(self) -> int:
        """H."""
        return int(self.states.shape[-1])

    def select(self, tokens: Int[np.ndarray, "n"]) -> HiddenStates:
        """Those of these tokens, in memory."""
        return HiddenStates(self.states[tokens], self.routers)

    def newest(
        self,
        starts: Int64[np.ndarray, "S+1"],
        tokens: Int[np.ndarray, "n"],
        seen: Int[np.ndarray, "*n"] | int,
    ) -> Float16[np.ndarray, "n H"]:
        """What the last router that ran was given, the first `seen` layers of each token known.

        At a token's start that is the last layer's of the token before it; zeros where a sequence begins.
        """
        layers = self.states.shape[1]
        place = tokens * layers + seen - 1
        first = np.isin(tokens, starts) & (np.asarray(seen) == 0)
        newest: Float16[np.ndarray, "n H"] = self.states.reshape(-1, self.size)[np.maximum(place, 0)]
        newest[first] = 0
        return newest


def mapped(
    parts: Iterable[Float16[np.ndarray, "n L H"]], shape: tuple[int, int, int], origin: str
) -> Float16[np.ndarray, "N L H"]:
    """All parts as one array of this shape, in a temporary file.

    Raises TraceError where a number is none, or they do not fit onto the disk.
    """
    try:
        with tempfile.TemporaryFile() as file:
            for part in parts:
                _check_finite(part, origin)
                file.write(np.ascontiguousarray(part).data)
            file.flush()
            if file.tell() != 2 * math.prod(shape):
                raise TraceFormatError(
                    f"{origin} has {file.tell()} bytes of hidden states, expected 2 each of {list(shape)}.",
                    remedy="Copy the recording again; it is damaged.",
                )
            return np.memmap(file, np.float16, "r", shape=shape)
    except OSError as error:
        raise TraceError(
            f"{origin}: hidden states cannot be kept in {tempfile.gettempdir()}: {error.strerror}; they take"
            f" {2 * math.prod(shape):,} bytes.",
            remedy="Set TMPDIR to a folder with room for them, or record fewer tokens.",
        ) from error


def _check_finite(states: Float16[np.ndarray, "n L H"], origin: str) -> None:
    if not np.isfinite(states).all():
        raise TraceError(
            f"{origin} has a hidden state that is no finite number.",
            remedy="Record it again, with --dtype float32 perhaps.",
        )


def concatenated(parts: Sequence[HiddenStates]) -> HiddenStates:
    """Those of all traces, in order. Raises TraceError where they are not of one model."""
    first, *others = parts
    if not others:
        return first
    for other in others:
        same = other.size == first.size and np.array_equal(_weights(other), _weights(first))
        if not same:
            raise TraceError(
                "The hidden states are of models with different routers, or were recorded differently.",
                remedy="Put together only what was recorded from one checkpoint.",
            )
    tokens = sum(len(part.states) for part in parts)
    states = mapped((part.states for part in parts), (tokens, *first.states.shape[1:]), "The trace")
    return HiddenStates(states, first.routers)


def _weights(hidden: HiddenStates) -> Float32[np.ndarray, "..."]:
    return np.zeros(0, np.float32) if hidden.routers is None else hidden.routers


def write_routers(folder: Path, routers: Float32[np.ndarray, "L E H+1"]) -> None:
    """Keep the routers beside the shards of `folder`."""
    partial = folder / f".{ROUTERS}.tmp"
    with partial.open("wb") as file:
        np.save(file, routers, allow_pickle=False)
    partial.replace(folder / ROUTERS)


def read_routers(folder: Path, spec: RoutingSpec, hidden_size: int) -> Float32[np.ndarray, "L E H+1"] | None:
    """The routers beside the shards of `folder`, None where there are none.

    Raises TraceFormatError where they are damaged or of another model.
    """
    path = folder / ROUTERS
    if not path.exists():
        return None
    shape = (spec.num_layers, spec.num_experts, hidden_size + 1)
    most = 4 * math.prod(shape) + HEADER_BYTES
    try:
        if path.stat().st_size > most:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected {most} at most")
        routers: Float32[np.ndarray, "L E H+1"] = np.load(path, allow_pickle=False)
        if routers.dtype != np.float32 or routers.shape != shape or not np.isfinite(routers).all():
            raise ValueError(f"it is {routers.dtype} {list(routers.shape)}, expected float32 {list(shape)}")
    except (OSError, ValueError, EOFError) as error:
        raise TraceFormatError(
            f"{path} cannot be read: {error}.", remedy="Copy or record it again, or remove it."
        ) from error
    return routers
