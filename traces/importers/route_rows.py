"""Puts rows of routed experts together to tokens and sequences; `route_csv` and `moe_trace` read them.

A row is one routed expert: of turn and step (the token), layer and slot. Rows may come in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int8, Int16, Int32, Int64

from traces.errors import TraceError
from traces.importers.told import Imported
from traces.spec import RoutingSpec
from traces.trace import UNKNOWN_DOMAIN, RoutingTrace, check

RECORD_AGAIN = "Record or copy the file again, or take this turn's lines out."
NO_LAST_LAYER = "prompt tokens were left out: the recorder has no last layer of them"


@dataclass(frozen=True)
class Rows:
    """The rows of a file, R of them. lines: where each is in it. layer: as the file numbers them."""

    origin: str
    lines: Int64[np.ndarray, "R"]
    turn: Int32[np.ndarray, "R"]
    phase: Int8[np.ndarray, "R"]
    step: Int32[np.ndarray, "R"]
    layer: Int16[np.ndarray, "R"]
    slot: Int16[np.ndarray, "R"]
    expert: Int16[np.ndarray, "R"]
    weight: Float32[np.ndarray, "R"]

    def refused(self, row: int, found: str, expected: str) -> TraceError:
        return TraceError(
            f"{self.origin}, line {self.lines[row]} (turn {self.turn[row]}, step {self.step[row]}):"
            f" {found}, expected {expected}.",
            remedy=RECORD_AGAIN,
        )


def assemble(rows: Rows, spec: RoutingSpec) -> Imported:
    """The trace that rows within the spec's ranges, and of its L layers, make.

    Raises TraceError naming the line where they make none.
    """
    positions, token = np.unique((rows.turn.astype(np.int64) << 32) + rows.step, return_inverse=True)
    layer = np.unique(rows.layer, return_inverse=True)[1]
    place = (token * spec.num_layers + layer) * spec.top_k + rows.slot
    order = np.argsort(place, kind="stable")
    _check_unique(rows, order, place)
    _check_no_gap(rows, positions, token)
    complete = _complete(rows, token, spec)
    # A complete token has L x K rows, and `order` has them layer by layer, slot by slot.
    kept = order[complete[token[order]]].reshape(-1, spec.num_layers, spec.top_k)
    _check_distinct(rows, kept)
    starts = _starts(positions, complete)
    trace = RoutingTrace(
        spec=spec,
        experts=rows.expert[kept],
        gates=_gates(rows, kept),
        token_ids=None,
        starts=starts,
        domains=(UNKNOWN_DOMAIN,) * (len(starts) - 1),
    )
    check(trace, rows.origin)
    return Imported(trace, {NO_LAST_LAYER: int((~complete).sum())})


def _check_unique(rows: Rows, order: Int[np.ndarray, "R"], place: Int64[np.ndarray, "R"]) -> None:
    twice = np.flatnonzero(np.diff(place[order]) == 0)
    if len(twice):
        row, before = int(order[twice[0] + 1]), int(order[twice[0]])
        raise rows.refused(
            row,
            f"layer {rows.layer[row]}, slot {rows.slot[row]} again, after line {rows.lines[before]}",
            "each slot of a layer once",
        )


def _check_no_gap(rows: Rows, positions: Int64[np.ndarray, "T"], token: Int[np.ndarray, "R"]) -> None:
    same_turn = np.diff(positions >> 32) == 0
    gaps = np.flatnonzero(same_turn & (np.diff(positions) != 1))
    if len(gaps):
        row = int(np.argmax(token == gaps[0] + 1))
        before = int(positions[gaps[0]] & 0xFFFFFFFF)
        raise rows.refused(row, f"this step comes after step {before}", f"step {before + 1} between them")


def _complete(rows: Rows, token: Int[np.ndarray, "R"], spec: RoutingSpec) -> Bool[np.ndarray, "T"]:
    """Which tokens have all layers. The others may only be prompt tokens that lack the last one."""
    found = np.bincount(token)
    found_last = np.bincount(token[rows.layer == rows.layer.max()], minlength=len(found))
    generated = np.bincount(token, weights=rows.phase)
    complete: Bool[np.ndarray, "T"] = found == spec.num_layers * spec.top_k
    early = (spec.num_layers - 1) * spec.top_k
    ends_early = (found == early) & (found_last == 0) & (generated == 0)
    broken = np.flatnonzero(~(complete | ends_early))
    if len(broken):
        row = int(np.flatnonzero(token == broken[0])[-1])
        raise rows.refused(
            row,
            f"the step has {found[broken[0]]} rows, the last of them here",
            f"{spec.num_layers} layers x {spec.top_k} slots = {spec.num_layers * spec.top_k}",
        )
    if not complete.any():
        raise rows.refused(len(token) - 1, "the file ends before any token has all layers", "one at least")
    return complete


def _check_distinct(rows: Rows, kept: Int[np.ndarray, "N L K"]) -> None:
    experts = rows.expert[kept]
    by_expert = np.argsort(experts, axis=-1, kind="stable")
    ordered = np.take_along_axis(experts, by_expert, axis=-1)
    twice = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
    if len(twice):
        token, layer, at = twice[0]
        row = int(kept[token, layer, by_expert[token, layer, at + 1]])
        raise rows.refused(
            row, f"layer {rows.layer[row]} routes to expert {rows.expert[row]} twice", "each expert once"
        )


def _gates(rows: Rows, kept: Int[np.ndarray, "N L K"]) -> Float32[np.ndarray, "N L K"] | None:
    """The weights; None where all are nan, which is how the recorder says that it does not know them."""
    gates: Float32[np.ndarray, "N L K"] = rows.weight[kept]
    if np.isnan(gates).all():
        return None
    bad = kept[~(np.isfinite(gates) & (gates >= 0))]
    if len(bad):
        row = int(bad.min())
        raise rows.refused(
            row, f"weight {rows.weight[row]}", "a finite number, 0 or more (or nan throughout)"
        )
    return gates


def _starts(positions: Int64[np.ndarray, "T"], complete: Bool[np.ndarray, "T"]) -> Int64[np.ndarray, "S+1"]:
    """A sequence begins with a turn, and after a token that was left out."""
    kept = np.flatnonzero(complete)
    begins = np.diff(positions[kept], prepend=-2) != 1  # turns differ in the upper bits
    return np.append(np.flatnonzero(begins), len(kept)).astype(np.int64)
