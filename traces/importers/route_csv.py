"""Reads the `route_trace v1` CSV that BigMoeOnEdge records: one line for each routed expert.

    # route_trace v1
    # model=/models/Qwen3-30B-A3B.gguf arch=qwen3moe n_layer=48 n_expert=128 n_expert_used=6
    # layer=0 expert_bytes=3059712 dense_bytes=11953152    (a line for each layer; no experts, no bytes)
    turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
    0,0,0,0,0,49,0.221297,0,3059712

Columns are found by name, and only those of COLUMNS are read: later recorders append others. A step is a
token, a turn a sequence. In the prompt (phase 0) the recorder's engine may run the last layer for the last
token only; the tokens before it, which have no routing there, are left out and counted.

    specmoe traces import recording.route.csv --out traces/
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from traces.errors import TraceError, TraceFormatError
from traces.importers import csv_columns
from traces.importers.csv_columns import Columns
from traces.importers.model import model_name, spec_of
from traces.importers.route_rows import Rows, assemble
from traces.importers.told import Imported
from traces.spec import MAX_LAYERS

FIRST_LINE = "# route_trace v1"
MODEL_LINE = re.compile(
    r"# model=(?P<model>.*) arch=\S* n_layer=(?P<layers>\d{1,6}) n_expert=(?P<experts>\d{1,6})"
    r" n_expert_used=(?P<top_k>\d{1,6})(?: .*)?"
)
LAYER_LINE = re.compile(r"# layer=(?P<layer>\d{1,6}) expert_bytes=(?P<bytes>\d{1,18})(?: .*)?")
COLUMNS = {
    "turn": pa.int32(),
    "phase": pa.int8(),
    "step": pa.int32(),
    "layer": pa.int16(),
    "slot": pa.int16(),
    "expert": pa.int16(),
    "weight": pa.float32(),
}

RECORD_AGAIN = "Give a file that BigMoeOnEdge wrote with --route-trace, whole and unchanged."


@dataclass(frozen=True)
class Preamble:
    """The lines before the rows. layers: how many the model has, of which `moe_layers` have experts (empty
    where the file does not say). lines: how many there are, with that of the column names."""

    model: str
    layers: int
    experts: int
    top_k: int
    moe_layers: frozenset[int]
    lines: int


def read(path: Path, *, model: str | None = None) -> Imported:
    """The trace in `path`, of domain "unknown". model: its name, where the file's own is not wanted.

    Raises TraceFormatError where the file is no such CSV, TraceError naming the line where its rows are no
    routing trace.
    """
    csv_columns.check_size(path, "Split it between turns, each part with the lines before the rows.")
    preamble = _preamble(path)
    whole_model = spec_of(
        path,
        model or model_name(preamble.model),
        num_layers=preamble.layers,
        num_experts=preamble.experts,
        top_k=preamble.top_k,
    )
    columns = csv_columns.read(path, COLUMNS, names_at=preamble.lines, remedy=RECORD_AGAIN)
    _check_ranges(path, preamble, columns)
    layers = np.unique(columns["layer"])
    if absent := sorted(preamble.moe_layers - set(layers.tolist())):
        raise TraceError(
            f"{path}: no rows of layer {absent[0]}, to which the preamble gives expert_bytes.",
            remedy=f"The file may be cut short. {RECORD_AGAIN}",
        )
    spec = replace(whole_model, num_layers=len(layers))
    lines = preamble.lines + 1 + np.arange(len(columns["layer"]))
    return assemble(Rows(str(path), lines, **columns), spec)


def _preamble(path: Path) -> Preamble:
    lines = _lines(path)
    if lines[0] != FIRST_LINE:
        raise _refused(path, 1, lines[0], FIRST_LINE)
    found = MODEL_LINE.fullmatch(lines[1]) if len(lines) > 1 else None
    if found is None:
        expected = "# model=... arch=... n_layer=... n_expert=... n_expert_used=..."
        raise _refused(path, 2, "".join(lines[1:2]), expected)
    names = lines[-1].split(",")
    if wanting := [name for name in COLUMNS if names.count(name) != 1]:
        raise _refused(path, len(lines), lines[-1], f"a column {wanting[0]}, once")
    layers = [line for line in map(LAYER_LINE.fullmatch, lines) if line]
    return Preamble(
        model=found["model"],
        layers=int(found["layers"]),
        experts=int(found["experts"]),
        top_k=int(found["top_k"]),
        moe_layers=frozenset(int(line["layer"]) for line in layers if int(line["bytes"])),
        lines=len(lines),
    )


def _lines(path: Path) -> list[str]:
    """The lines that begin with # and the one after them."""
    lines: list[str] = []
    with path.open("rb") as file:
        while not lines or (lines[-1].startswith("#") and len(lines) < MAX_LAYERS + 16):
            lines.append(csv_columns.line(path, file, RECORD_AGAIN))
    return lines


def _refused(path: Path, line: int, found: str, expected: str) -> TraceFormatError:
    return TraceFormatError(
        f"{path}, line {line}: found {found[:100]!r}, expected {expected}.", remedy=RECORD_AGAIN
    )


def _check_ranges(path: Path, preamble: Preamble, columns: Columns) -> None:
    limits = {
        "turn": None,
        "phase": 2,
        "step": None,
        "layer": preamble.layers,
        "slot": preamble.top_k,
        "expert": preamble.experts,
    }
    for name, limit in limits.items():
        values = columns[name]
        outside = (values < 0) | (values >= limit) if limit else values < 0
        if outside.any():
            row = int(np.argmax(outside))
            expected = f"0 to {limit - 1}" if limit else "0 or more"
            raise _refused(path, preamble.lines + 1 + row, f"{name} {values[row]}", expected)
