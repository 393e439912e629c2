"""Reads what SGLang's expert distribution recorder writes (`--expert-distribution-recorder-mode per_token`).

    {"records": [{"input_ids": [...], "positions": [...], "extend_seq_lens": [3, 2], "forward_mode": 1,
                  "topk_ids_of_layer": int32 [layers, tokens, 8], ...}, ...],
     "last_physical_to_logical_map": integers [layers, experts]}

A record is one forward pass; `running_batch` tells which tokens make a sequence. The file is read by torch:
tensors and plain containers only.

    specmoe traces import expert_distribution_recorder_1763.2_0.pt --out traces/ --model deepseek-v3
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from traces.errors import TraceError, TraceFormatError
from traces.importers.recorded import UNROUTED, Recorded, trace_of
from traces.importers.running_batch import Pass, RunningBatch
from traces.importers.told import Imported, Told

MAX_BYTES = 4 << 30
# Of SGLang's ForwardMode: a prompt's piece, a token each, both, nothing. Others are of speculative decoding.
EXTEND, DECODE, MIXED, IDLE = 1, 2, 3, 4
WITHIN = "sequences begin within a text: what goes before, or whose it is, was not recorded"
PER_TOKEN = "Record with --expert-distribution-recorder-mode per_token, and give the file it wrote."  # noqa: S105
# What a damaged file raises, depending on where the damage is.
DAMAGE = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, TypeError)


def read(path: Path, told: Told) -> Imported:
    """The trace in `path`, of domain "unknown".

    Raises TraceFormatError where the file cannot be read, TraceError naming the record that is malformed.
    """
    if told.model is None:
        raise TraceFormatError(f"{path} does not name its model.", remedy="Name it: --model NAME.")
    document = _loaded(path)
    num_experts = _num_experts(path, document.get("last_physical_to_logical_map"))
    batch = RunningBatch()
    for number, record in enumerate(document["records"]):
        where = f"record {number}"
        if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
            raise TraceError(f"{path}, {where}: no topk_ids_of_layer.", remedy=PER_TOKEN)
        if record.get("forward_mode") != IDLE:
            batch.run(_pass(path, where, record))
    sequences = batch.sequences()
    if not sequences:
        raise TraceError(f"{path} has no tokens.", remedy="Send requests between start and dump.")
    imported = trace_of(path, _without_unused_slots(sequences), model=told.model, num_experts=num_experts)
    return replace(imported, notes={**imported.notes, WITHIN: batch.begun_within})


def _loaded(path: Path) -> dict[str, Any]:
    """The file's dictionary, its tensors still as they are."""
    import torch

    _check_size(path)
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceFormatError(
            f"{path} cannot be read as tensors and plain containers: {reason[:300]}.",
            remedy="Copy it again. Nothing else is ever unpickled.",
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("records"), list):
        raise TraceError(f"{path} has no records of single tokens.", remedy=PER_TOKEN)
    return document


def _check_size(path: Path) -> None:
    """Refuse what unpacks to more than it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise TraceFormatError(f"{path} is no file of torch.save: {error}.", remedy=PER_TOKEN) from error
    held = path.stat().st_size
    claimed = sum(entry.file_size for entry in entries)
    if claimed > min(held, MAX_BYTES):
        raise TraceFormatError(
            f"{path} claims {claimed} bytes; it has {held}, and {MAX_BYTES} is the most that is read.",
            remedy="Dump the recorder more often, and import the folder.",
        )


def _num_experts(path: Path, physical_to_logical: Any) -> int:
    """E, where every physical expert is the logical one of its number."""
    mapped = _array(path, "last_physical_to_logical_map", physical_to_logical, 2)
    if not np.array_equal(mapped, np.broadcast_to(np.arange(mapped.shape[1]), mapped.shape)):
        raise TraceError(
            f"{path} holds physical ids: last_physical_to_logical_map has experts replicated or moved.",
            remedy="Record without --enable-eplb, --init-expert-location and redundant experts: logical ids.",
        )
    return len(mapped[0])


def _pass(path: Path, where: str, record: dict[str, Any]) -> Pass:
    mode = record.get("forward_mode")
    if mode not in {EXTEND, DECODE, MIXED}:
        raise TraceError(
            f"{path}, {where}: forward_mode is {mode!r}, expected {EXTEND} (extend), {DECODE} (decode) or"
            f" {MIXED} (mixed).",
            remedy="Record without speculative decoding.",
        )
    experts = np.swapaxes(_array(path, f"{where}: topk_ids_of_layer", record["topk_ids_of_layer"], 3), 0, 1)
    tokens = len(experts)
    lengths = (
        np.ones(tokens, np.int64) if mode == DECODE else _list(path, where, record, "extend_seq_lens", None)
    )
    positions = _list(path, where, record, "positions", tokens)
    if lengths.sum() != tokens or (lengths < 1).any():
        raise TraceError(
            f"{path}, {where}: extend_seq_lens is {lengths.tolist()[:20]}, expected numbers from 1 whose sum"
            f" is {tokens}, the tokens of topk_ids_of_layer.",
            remedy=PER_TOKEN,
        )
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    if not np.array_equal(positions, positions[starts] + np.arange(tokens) - starts):
        raise TraceError(
            f"{path}, {where}: positions do not follow one another within a request.", remedy=PER_TOKEN
        )
    return Pass(
        where=where,
        experts=experts,
        token_ids=_list(path, where, record, "input_ids", tokens).astype(np.int32),
        positions=positions,
        lengths=lengths,
        decodes=mode == DECODE,
    )


def _list(
    path: Path, where: str, record: dict[str, Any], name: str, length: int | None
) -> Int[np.ndarray, "n"]:
    values = record.get(name)
    if (
        not isinstance(values, list)
        or (length is not None and len(values) != length)
        or not all(type(value) is int and 0 <= value < 1 << 31 for value in values)
    ):
        raise TraceError(
            f"{path}, {where}: {name} is not a list of {'' if length is None else f'{length} '}numbers.",
            remedy=PER_TOKEN,
        )
    return np.array(values, np.int64)


def _array(path: Path, name: str, value: Any, dimensions: int) -> Int[np.ndarray, "..."]:
    """A tensor as an array, once it is sure that its storage holds it."""
    import torch

    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.dtype not in {torch.int32, torch.int64}
        or value.ndim != dimensions
        or value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ):
        raise TraceError(
            f"{path}, {name} is no tensor of integers with {dimensions} dimensions.", remedy=PER_TOKEN
        )
    return value.numpy()


def _without_unused_slots(sequences: list[Recorded]) -> list[Recorded]:
    """Eight slots are recorded, whatever top-k is; those of no token are not the model's."""
    used = np.any([(sequence.experts != UNROUTED).any(axis=(0, 1)) for sequence in sequences], axis=0)
    top_k = int(np.flatnonzero(used).max(initial=0)) + 1
    return [replace(sequence, experts=sequence.experts[..., :top_k]) for sequence in sequences]
