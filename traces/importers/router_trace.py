"""Reads what Megatron-LM writes with `--moe-routing-trace-path`: router_trace_rankN.jsonl.

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 128,
     "topk": 8, "top_indices": [[12, 45, ...], ...]}

A record is a layer of a forward pass; none says which sequence a token is of. Without --micro-batch they are
taken for inference of one request at a time: a pass of several tokens begins a sequence, one of a single
token goes on with it. --micro-batch B means training: each pass is of B sequences, whose tokens alternate.

    specmoe traces import router_trace_rank0.jsonl --out traces/ \\
        --model nemotron --num-experts 128 --micro-batch 1
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from traces.errors import TraceError, TraceFormatError
from traces.importers import json_records
from traces.importers.json_records import STORE_AGAIN, Record
from traces.importers.recorded import Recorded, trace_of
from traces.importers.told import Imported, Told, needed

DECODER = "decoder"
OTHER_BLOCKS = "records were left out: they are not of the decoder (but of multi-token prediction, say)"
MAX_ID = 1 << 15
ONE_BY_ONE = (
    "Say --micro-batch N if this is training, with N sequences a micro-batch. Of inference, record one"
    " request at a time, without chunked prefill."
)
WHOLE_STEPS = "Record all layers of whole steps, without CUDA graphs, and give one rank's file."


@dataclass(frozen=True)
class _Layer:
    """One record of the decoder, checked."""

    where: str
    step: int
    number: int
    experts: Int32[np.ndarray, "n K"]


@dataclass(frozen=True)
class _Pass:
    """One forward pass through all layers."""

    where: str
    step: int
    layers: list[int]
    experts: Int32[np.ndarray, "n L K"]


def read(path: Path, told: Told) -> Imported:
    """The trace in `path`, of domain "unknown".

    Raises TraceError naming the line that is malformed, or where the tokens may be of several sequences.
    """
    if told.model is None:
        raise TraceFormatError(f"{path} does not name its model.", remedy="Name it: --model NAME.")
    num_experts = needed(path, told.num_experts, "how many experts a layer has", "--num-experts")
    others = 0
    layers: list[_Layer] = []
    for record in json_records.read(path):
        if record.fields.get("block", DECODER) == DECODER:
            layers.append(_layer(record))
        else:
            others += 1
    passes = [
        done
        for _, step in groupby(layers, key=lambda layer: layer.step)
        for done in _passes(path, list(step))
    ]
    if not passes:
        raise TraceError(f"{path} has no records of the decoder.", remedy=WHOLE_STEPS)
    _check_same_layers(path, passes)
    if told.micro_batch is None:
        sequences = list(_requests(path, passes))
    else:
        size = needed(path, told.micro_batch, "how many sequences a micro-batch has", "--micro-batch")
        sequences = [part for done in passes for part in _micro_batch(path, done, size)]
    imported = trace_of(path, sequences, model=told.model, num_experts=num_experts, layers=passes[0].layers)
    return replace(imported, notes={**imported.notes, OTHER_BLOCKS: others})


def _layer(record: Record) -> _Layer:
    for name in ("step", "layer", "num_tokens", "topk"):
        value = record.fields.get(name)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise record.refused(f"{name} is {value!r}, expected a number.", STORE_AGAIN)
    shape = (record.fields["num_tokens"], record.fields["topk"])
    try:
        experts = np.array(record.fields.get("top_indices"))
    except ValueError as error:
        raise record.refused(f"top_indices: {error}.", STORE_AGAIN) from error
    if experts.dtype.kind != "i" or experts.shape != shape or abs(experts).max(initial=0) > MAX_ID:
        raise record.refused(
            f"top_indices is {experts.dtype} {list(experts.shape)}, expected expert ids {list(shape)}:"
            " [num_tokens, topk].",
            STORE_AGAIN,
        )
    return _Layer(record.where, record.fields["step"], record.fields["layer"], experts.astype(np.int32))


def _passes(path: Path, step: Sequence[_Layer]) -> Iterator[_Pass]:
    """The forward passes of a step: as many as each of its layers has records (micro-batches of training)."""
    by_layer: dict[int, list[_Layer]] = defaultdict(list)
    for layer in step:
        by_layer[layer.number].append(layer)
    numbers = sorted(by_layer)
    sizes = {number: [len(layer.experts) for layer in by_layer[number]] for number in numbers}
    for number in numbers:
        if sizes[number] != sizes[numbers[0]]:
            raise TraceError(
                f"{path}, {by_layer[number][-1].where}: step {step[0].step} has passes of"
                f" {sizes[number][:20]} tokens in layer {number}, but of {sizes[numbers[0]][:20]} in layer"
                f" {numbers[0]}.",
                remedy=WHOLE_STEPS,
            )
    for together in zip(*(by_layer[number] for number in numbers), strict=True):
        shapes = {layer.experts.shape[1] for layer in together}
        if len(shapes) != 1:
            raise TraceError(
                f"{path}, {together[0].where}: layers of one pass have topk {sorted(shapes)}, expected one.",
                remedy=STORE_AGAIN,
            )
        experts = np.stack([layer.experts for layer in together], axis=1)
        yield _Pass(together[0].where, step[0].step, numbers, experts)


def _check_same_layers(path: Path, passes: Sequence[_Pass]) -> None:
    for done in passes:
        if done.layers != passes[0].layers:
            raise TraceError(
                f"{path}, {done.where}: step {done.step} has layers {done.layers}, expected those of step"
                f" {passes[0].step}: {passes[0].layers}.",
                remedy=WHOLE_STEPS,
            )


def _requests(path: Path, passes: Sequence[_Pass]) -> Iterator[Recorded]:
    """The sequences of inference, one after another. A step that is missing ends one."""
    for before, done in pairwise(passes):
        if len(before.experts) > 1 and len(done.experts) > 1:
            raise TraceError(
                f"{path}, {done.where}: a pass of {len(done.experts)} tokens follows one of"
                f" {len(before.experts)}. They may be of several sequences.",
                remedy=ONE_BY_ONE,
            )
    begins = [
        index
        for index, done in enumerate(passes)
        if index == 0 or len(done.experts) != 1 or done.step != passes[index - 1].step + 1
    ]
    for start, stop in pairwise([*begins, len(passes)]):
        yield Recorded(passes[start].where, np.concatenate([done.experts for done in passes[start:stop]]))


def _micro_batch(path: Path, done: _Pass, size: int) -> Iterator[Recorded]:
    """The sequences of a training pass, whose rows are theirs in turn."""
    if len(done.experts) % size:
        raise TraceError(
            f"{path}, {done.where}: {len(done.experts)} tokens, expected a multiple of {size}.",
            remedy="Correct --micro-batch.",
        )
    for sequence in range(size):
        yield Recorded(f"{done.where}, sequence {sequence}", done.experts[sequence::size])
