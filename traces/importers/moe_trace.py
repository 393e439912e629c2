"""Reads the CSV of `llama-moe-trace`, an example of llama.cpp that comes in three layouts.

    3,17                            layer,expert: a line for each routed expert, no names (llama.cpp, #28544)
    0,3,17,42,5,60                  pos,layer,expert,expert,...: a line for each layer, no names
    decode,7,3,0,17                 phase,token,layer,rank,expert, with a line of names

Generated tokens are read. The prompt's are left out: llama.cpp runs the last layer for the last of them only,
and some versions copy the others' experts wrongly. docs/importing.md tells which.

    specmoe traces import moe_trace.csv --out traces/ --model qwen3-30b-a3b --num-experts 128
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Int64

from traces.errors import TraceError, TraceFormatError
from traces.importers import csv_columns
from traces.importers.model import spec_of
from traces.importers.recorded import LOGICAL_IDS
from traces.importers.route_rows import Rows, assemble
from traces.importers.told import Imported, Told, needed

NAMES = ("phase", "token", "layer", "rank", "expert")
NUMBERS = re.compile(r"-?\d+(,-?\d+)+")
NOT_THE_PROMPT = "prompt tokens were left out: llama.cpp runs the last layer for the last of them only"
RECORD_AGAIN = "Give a file that llama-moe-trace wrote, whole and unchanged."


@dataclass(frozen=True)
class _Routed:
    """Routed experts of generated tokens, R of them. text: which of the recordings in the file it is of.

    num_layers: of the whole file, the prompt's too.
    """

    lines: Int64[np.ndarray, "R"]
    text: Int[np.ndarray, "R"]
    token: Int[np.ndarray, "R"]
    layer: Int[np.ndarray, "R"]
    slot: Int[np.ndarray, "R"]
    expert: Int[np.ndarray, "R"]
    prompt_tokens: int
    num_layers: int


def is_moe_trace(path: Path) -> bool:
    """Whether a CSV begins as one of the three layouts does."""
    with path.open("rb") as file:
        line = csv_columns.line(path, file, RECORD_AGAIN)
    return line == ",".join(NAMES) or NUMBERS.fullmatch(line) is not None


def read(path: Path, told: Told) -> Imported:
    """The trace in `path`, of domain "unknown".

    Raises TraceFormatError where the file is no such CSV, TraceError naming the line that is malformed.
    """
    if told.model is None:
        raise TraceFormatError(f"{path} does not name its model.", remedy="Name it: --model NAME.")
    num_experts = needed(path, told.num_experts, "how many experts a layer has", "--num-experts")
    csv_columns.check_size(path, "Split it between recordings.")
    routed = _routed(path)
    if not len(routed.expert):
        raise TraceError(
            f"{path} has no generated token.",
            remedy="Record with -n, some tokens at least. A file that was cut short may look so, too.",
        )
    _check_ids(path, routed, num_experts)
    spec = spec_of(
        path,
        told.model,
        num_layers=routed.num_layers,
        num_experts=num_experts,
        top_k=int(routed.slot.max()) + 1,
    )
    rows = Rows(
        origin=str(path),
        lines=routed.lines,
        turn=routed.text.astype(np.int32),
        phase=np.ones(len(routed.text), np.int8),
        step=routed.token.astype(np.int32),
        layer=routed.layer.astype(np.int16),
        slot=routed.slot.astype(np.int16),
        expert=routed.expert.astype(np.int16),
        weight=np.full(len(routed.text), np.nan, np.float32),
    )
    layers = tuple(np.unique(routed.layer).tolist())
    return Imported(assemble(rows, spec).trace, {NOT_THE_PROMPT: routed.prompt_tokens}, layers)


def _routed(path: Path) -> _Routed:
    with path.open("rb") as file:
        line = csv_columns.line(path, file, RECORD_AGAIN)
    if line == ",".join(NAMES):
        return _by_rank(path)
    if NUMBERS.fullmatch(line) is None:
        raise TraceFormatError(
            f"{path}, line 1: found {line[:100]!r}, expected numbers, or {','.join(NAMES)}.",
            remedy=RECORD_AGAIN,
        )
    numbers = line.count(",") + 1
    return _by_expert(path) if numbers == 2 else _by_layer(path, numbers - 2)


def _by_rank(path: Path) -> _Routed:
    """phase,token,layer,rank,expert"""
    types = dict.fromkeys(NAMES, pa.int32()) | {"phase": pa.string()}
    columns = csv_columns.read(path, types, names_at=1, remedy=RECORD_AGAIN)
    phase, lines = columns["phase"], np.arange(len(columns["phase"])) + 2
    generated = np.asarray(phase == "decode")
    odd = np.flatnonzero(~generated & (phase != "prefill"))
    if len(odd):
        raise _refused(path, int(lines[odd[0]]), f"phase {phase[odd[0]]!r}", "prefill or decode")
    _check_not_negative(path, lines, {name: columns[name] for name in NAMES[1:]})
    return _Routed(
        lines=lines[generated],
        text=np.zeros(int(generated.sum()), np.int32),
        token=columns["token"][generated],
        layer=columns["layer"][generated],
        slot=columns["rank"][generated],
        expert=columns["expert"][generated],
        prompt_tokens=len(np.unique(columns["token"][~generated])),
        num_layers=len(np.unique(columns["layer"])),
    )


def _by_layer(path: Path, top_k: int) -> _Routed:
    """pos,layer,expert,expert,...; a prompt's positions are negative, those of the rest begin at 0."""
    experts = [f"expert {slot}" for slot in range(top_k)]
    types = dict.fromkeys(["pos", "layer", *experts], pa.int32())
    columns = csv_columns.read(path, types, names_at=0, remedy=RECORD_AGAIN)
    lines, generated = np.arange(len(columns["pos"])) + 1, columns["pos"] >= 0
    _check_not_negative(path, lines, {name: columns[name] for name in ["layer", *experts]})
    prompt_layers = columns["layer"][~generated]
    pos = columns["pos"][generated]
    text = np.cumsum((np.diff(pos, prepend=0) < 0) | (np.diff(lines[generated], prepend=0) > 1))
    repeat = np.repeat(np.arange(len(pos)), top_k)
    return _Routed(
        lines=lines[generated][repeat],
        text=text[repeat],
        token=pos[repeat],
        layer=columns["layer"][generated][repeat],
        slot=np.tile(np.arange(top_k), len(pos)),
        expert=np.stack([columns[name][generated] for name in experts], axis=1).reshape(-1),
        prompt_tokens=int(np.unique(prompt_layers, return_counts=True)[1].max(initial=0)),
        num_layers=len(np.unique(columns["layer"])),
    )


def _by_expert(path: Path) -> _Routed:
    """layer,expert: top_k lines a token and layer, all of a batch's tokens for a layer at once.

    The shortest run of a layer's lines is one token's. A batch of several tokens is of a prompt.
    """
    columns = csv_columns.read(
        path, {"layer": pa.int32(), "expert": pa.int32()}, names_at=0, remedy=RECORD_AGAIN
    )
    layer, lines = columns["layer"], np.arange(len(columns["layer"])) + 1
    _check_not_negative(path, lines, columns)
    starts = np.flatnonzero(np.diff(layer, prepend=-1))
    sizes = np.diff(starts, append=len(layer))
    if len(starts) == 1:
        raise _refused(path, 1, "one layer only", "two at least, without which tokens cannot be told apart")
    top_k = int(sizes.min())
    odd = np.flatnonzero(sizes % top_k)
    if len(odd):
        raise _refused(
            path,
            int(lines[starts[odd[0]]]),
            f"{sizes[odd[0]]} lines of layer {layer[starts[odd[0]]]}",
            f"a multiple of {top_k}, the fewest lines that follow one another for a layer",
        )
    step = np.cumsum(np.diff(layer[starts], prepend=layer[0]) < 0)  # of each run: which batch
    tokens = np.zeros(step[-1] + 1, np.int64)  # of each batch
    np.maximum.at(tokens, step, sizes // top_k)
    single: Bool[np.ndarray, "steps"] = tokens == 1
    generated = np.repeat(single[step], sizes)
    numbers = np.repeat(step, sizes)[generated]
    return _Routed(
        lines=lines[generated],
        text=np.cumsum(~single)[numbers],
        token=numbers,
        layer=layer[generated],
        slot=(np.arange(len(layer)) - np.repeat(starts, sizes))[generated],
        expert=columns["expert"][generated],
        prompt_tokens=int(tokens[~single].sum()),
        num_layers=len(np.unique(layer)),
    )


def _check_not_negative(
    path: Path, lines: Int64[np.ndarray, "R"], columns: dict[str, Int[np.ndarray, "R"]]
) -> None:
    for name, values in columns.items():
        if (values < 0).any():
            row = int(np.argmax(values < 0))
            raise _refused(path, int(lines[row]), f"{name} {values[row]}", "0 or more")


def _check_ids(path: Path, routed: _Routed, num_experts: int) -> None:
    for name, values, limit, remedy in (
        ("expert", routed.expert, num_experts, LOGICAL_IDS),
        ("layer", routed.layer, np.iinfo(np.int16).max, RECORD_AGAIN),
        ("rank", routed.slot, num_experts, RECORD_AGAIN),
    ):
        if (values >= limit).any():
            row = int(np.argmax(values >= limit))
            raise TraceError(
                f"{path}, line {routed.lines[row]}: {name} {values[row]}, expected 0 to {limit - 1}.",
                remedy=remedy,
            )


def _refused(path: Path, line: int, found: str, expected: str) -> TraceError:
    return TraceError(f"{path}, line {line}: {found}, expected {expected}.", remedy=RECORD_AGAIN)
