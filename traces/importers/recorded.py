"""Makes a trace of sequences as a dump holds them: with dense layers, and gaps where nothing was recorded.

The importers hand over one `Recorded` for each sequence. A layer without routing throughout is dense
and does not count. A token without routing in any layer (its place came from a cache, say) is left out, and
what comes after it is a sequence of its own. Whatever else is missing or odd is refused by its place.

    specmoe traces import responses.jsonl --out traces/ --num-experts 128
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, Shaped

from traces.errors import TraceError
from traces.importers.model import spec_of
from traces.importers.told import Imported
from traces.spec import RoutingSpec
from traces.trace import UNKNOWN_DOMAIN, RoutingTrace, check, concatenate

UNROUTED = -1
NO_ROUTING = "tokens were left out: the dump has no routing of them (from a cache, say)"
LOGICAL_IDS = (
    "Correct the number of experts. Where experts are replicated to balance their load, a dump may hold the"
    " replicas' physical ids: export logical ids, or record without load balancing."
)
RECORD_AGAIN = "Record it again, or take this sequence out."


@dataclass(frozen=True)
class Recorded:
    """A sequence of n tokens, D layers (dense ones too) and K routed experts each.

    where: its place in the dump, as in "line 3". experts: any integers. token_ids: -1 where unknown.
    """

    where: str
    experts: Shaped[np.ndarray, "n D K"]
    gates: Float32[np.ndarray, "n D K"] | None = None
    token_ids: Int32[np.ndarray, "n"] | None = None
    domain: str = UNKNOWN_DOMAIN


@dataclass(frozen=True)
class Fillers:
    """What stands in all K places where no routing was recorded: -1, and `values` besides.

    A value that may be an expert's id counts only where K > 1, as no expert is routed to twice.
    zero_layers: a layer of zeros throughout the dump is dense, with K = 1 too.
    """

    values: tuple[int, ...] = ()
    zero_layers: bool = False

    def routed(self, experts: Shaped[np.ndarray, "n D K"], num_experts: int) -> Bool[np.ndarray, "n D"]:
        """Where routing was recorded."""
        first = experts[..., 0]
        empty: Bool[np.ndarray, "n D"] = np.equal(first, UNROUTED)
        for value in self.values:
            if experts.shape[-1] > 1 or value >= num_experts:
                empty |= np.equal(first, value)
        return np.asarray(~(empty & np.equal(experts, first[..., None]).all(axis=-1)))

    def present(self, sequence: Recorded, routed: Bool[np.ndarray, "n D"]) -> Bool[np.ndarray, "D"]:
        """Which layers are not dense, as far as one sequence tells."""
        if self.zero_layers:
            routed = routed & (sequence.experts != 0).any(axis=-1)
        return np.asarray(routed.any(axis=0))


MINUS_ONE = Fillers()


def trace_of(
    path: Path,
    sequences: Sequence[Recorded],
    *,
    model: str,
    num_experts: int,
    fillers: Fillers = MINUS_ONE,
    layers: Sequence[int] | None = None,
) -> Imported:
    """The trace that the sequences of one dump make, of the layers in which any token is routed.

    layers: the dump's own numbers of the D layers, where they are not 0 to D - 1.
    Raises TraceError naming the sequence, token and layer where they make none.
    """
    num_layers, top_k = _common_shape(path, sequences)
    numbers = np.arange(num_layers) if layers is None else np.array(layers)
    routed = [fillers.routed(sequence.experts, num_experts) for sequence in sequences]
    present = np.any([fillers.present(*pair) for pair in zip(sequences, routed, strict=True)], axis=0)
    if not present.any():
        raise TraceError(
            f"{path} has no routing of any token.", remedy="Record with routing enabled, and without a cache."
        )
    spec = spec_of(path, model, num_layers=int(present.sum()), num_experts=num_experts, top_k=top_k)
    pieces: list[RoutingTrace] = []
    left_out = 0
    for sequence, cells in zip(sequences, routed, strict=True):
        complete = _complete(path, sequence, cells[:, present], numbers[present])
        _check_ids(path, sequence, complete, present, numbers, num_experts)
        pieces += _pieces(path, sequence, complete, present, spec)
        left_out += int((~complete).sum())
    return Imported(
        concatenate(pieces),
        {NO_ROUTING: left_out},
        layers=tuple(numbers[present].tolist()),
        dense=tuple(numbers[~present].tolist()),
    )


def _common_shape(path: Path, sequences: Sequence[Recorded]) -> tuple[int, int]:
    """Layers and top-k of all sequences, which must agree."""
    first = sequences[0]
    for sequence in sequences:
        shape = sequence.experts.shape[1:]
        if shape != first.experts.shape[1:] or 0 in shape:
            raise TraceError(
                f"{path}, {sequence.where}: {shape[0]} layers and top-{shape[1]}, expected those of"
                f" {first.where}: {first.experts.shape[1]} and top-{first.experts.shape[2]}, none of them 0.",
                remedy="Keep each model's dumps apart.",
            )
    return first.experts.shape[1], first.experts.shape[2]


def _complete(
    path: Path, sequence: Recorded, routed: Bool[np.ndarray, "n L"], numbers: Int64[np.ndarray, "L"]
) -> Bool[np.ndarray, "n"]:
    """Which tokens are routed in all layers. The others must be routed in none."""
    complete = np.asarray(routed.all(axis=1))
    partial = np.flatnonzero(routed.any(axis=1) & ~complete)
    if len(partial):
        token = int(partial[0])
        layer = int(numbers[np.argmin(routed[token])])
        raise TraceError(
            f"{path}, {sequence.where}: token {token} has no routing in layer {layer}, but in others.",
            remedy=RECORD_AGAIN,
        )
    return complete


def _check_ids(
    path: Path,
    sequence: Recorded,
    complete: Bool[np.ndarray, "n"],
    present: Bool[np.ndarray, "D"],
    numbers: Int[np.ndarray, "D"],
    num_experts: int,
) -> None:
    experts = sequence.experts
    outside = np.logical_or(experts < 0, experts >= num_experts) & complete[:, None, None] & present[:, None]
    if outside.any():
        token, layer, slot = (int(at) for at in np.argwhere(outside)[0])
        raise TraceError(
            f"{path}, {sequence.where}: token {token}, layer {numbers[layer]}: expert id is"
            f" {experts[token, layer, slot]}, expected 0 to {num_experts - 1}.",
            remedy=LOGICAL_IDS,
        )


def _pieces(
    path: Path,
    sequence: Recorded,
    complete: Bool[np.ndarray, "n"],
    present: Bool[np.ndarray, "D"],
    spec: RoutingSpec,
) -> Iterator[RoutingTrace]:
    """The runs of complete tokens of a sequence, checked."""
    edges = np.flatnonzero(np.diff(complete, prepend=False, append=False))
    for start, stop in edges.reshape(-1, 2).tolist():
        piece = RoutingTrace(
            spec=spec,
            experts=sequence.experts[start:stop, present].astype(np.int16),
            gates=None if sequence.gates is None else sequence.gates[start:stop, present],
            token_ids=None if sequence.token_ids is None else sequence.token_ids[start:stop],
            starts=np.array([0, stop - start]),
            domains=(sequence.domain,),
        )
        check(piece, f"{path}, {sequence.where}", first_row=start)
        yield piece
