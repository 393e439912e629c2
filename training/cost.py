"""What a version costs to run: parameters, bytes, and the time of one step on this machine.

Beside the scores of an evaluation, since a better forecast that comes too late is worth nothing.

    specmoe evaluate gpt-oss-20b --traces test.npz
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from model_store.manifest import STEP
from speculation.golden import golden_hidden, golden_inputs
from speculation.runtime import Speculator
from speculation.steps import Steps

WARM_UP = 30
REPEATS = 300


def measure_cost(speculator: Speculator) -> dict[str, Any]:
    """Size from the manifest; median microseconds of one predict and one advance of a single sequence.

    Half of the layers are seen, as in the middle of a token, and a hidden state is told where it is read.
    Checks of the input are part of the time.
    """
    manifest = speculator.manifest
    token_ids, experts, gates = golden_inputs(speculator.spec)
    half_seen = experts[-1:].copy()
    half_seen[:, speculator.spec.num_layers // 2 :] = -1
    state, size = speculator.initial_state(1), manifest.hidden_size
    hidden = (golden_hidden(size),) if size else ()
    return {
        "predictor": manifest.predictor.name,
        "parameters": manifest.predictor.parameters,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "predict_us": _median_us(
            lambda: speculator.predict(state, token_ids[-1:], half_seen, gates[-1:], *hidden)
        ),
        "advance_us": _median_us(lambda: speculator.advance(state, token_ids[:1], experts[:1], gates[:1])),
        "provider": speculator.provider,
        "hardware": hardware(),
    }


def measure_step(speculator: Speculator) -> float | None:
    """Median microseconds of one step of a single sequence that tells of one layer; None without steps."""
    if STEP not in speculator.graphs:
        return None
    steps, state = Steps(speculator), speculator.initial_state(1)
    token_ids, experts, gates = golden_inputs(speculator.spec)
    token = steps.begin([state[place] for place in steps.begin_reads], token_ids[:1])
    read, progress = [state[place] for place in steps.step_reads], steps.initial_progress(1)
    layer = np.array([[speculator.spec.num_layers // 2]], np.int32)
    told = experts[:1, :1].copy(), gates[:1, :1].copy()
    return _median_us(lambda: steps.step(read, token, progress, layer, *told))


def hardware() -> str:
    """Processor and number of cores, for people."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _median_us(step: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter_ns()
        step()
        times.append(time.perf_counter_ns() - began)
    return median(times) / 1000
