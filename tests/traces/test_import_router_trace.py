"""Megatron-LM's router trace: passes become sequences, and what may be of several requests is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import FIXTURES, bare, made_up_trace, same, traces
from traces.errors import TraceError, TraceFormatError
from traces.importers import router_trace
from traces.importers.router_trace import OTHER_BLOCKS
from traces.importers.told import Imported, Told
from traces.trace import RoutingTrace

EIGHT = Told("toy", num_experts=8)
Records = list[dict[str, Any]]


def record(step: int, layer: int, experts: np.ndarray, block: str = "decoder") -> dict[str, Any]:
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": block,
        "layer": layer,
        "rank": 0,
        "num_tokens": len(experts),
        "topk": experts.shape[1],
        "top_indices": experts.tolist(),
    }


def inference(trace: RoutingTrace, prompt: int) -> Records:
    """One request after another: its prompt, then a token a step."""
    passes: list[np.ndarray] = []
    for index in range(trace.num_sequences):
        experts = trace.experts[trace.sequence(index)]
        passes += [experts[:prompt], *np.split(experts[prompt:], range(1, len(experts) - prompt))]
    return [
        record(step, 2 * layer + 1, experts[:, layer])
        for step, experts in enumerate(passes)
        for layer in range(trace.spec.num_layers)
        if len(experts)
    ]


def training(trace: RoutingTrace, batch: int, passes_a_step: int) -> Records:
    """Sequences of one length, [position, sequence] in a micro-batch, and several of those in a step."""
    sequences = [trace.experts[trace.sequence(index)] for index in range(trace.num_sequences)]
    passes = [
        np.stack(sequences[at : at + batch], axis=1).reshape(-1, *trace.experts.shape[1:])
        for at in range(0, len(sequences), batch)
    ]
    return [
        record(number // passes_a_step, layer, experts[:, layer])
        for number, experts in enumerate(passes)
        for layer in range(trace.spec.num_layers)
    ]


def read(path: Path, records: Sequence[Any], told: Told = EIGHT) -> Imported:
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return router_trace.read(path, told)


def test_the_fixture_is_what_its_records_say() -> None:
    imported = router_trace.read(FIXTURES / "router_trace.jsonl", Told("toy", num_experts=4))
    assert imported.trace.experts.tolist() == [[[3, 1], [2, 0]], [[1, 2], [0, 3]], [[2, 3], [1, 0]]]
    assert imported.trace.starts.tolist() == [0, 3]
    assert imported.notes[OTHER_BLOCKS] == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(traces(), st.integers(2, 4))
def test_requests_one_after_another_come_back(tmp_path: Path, trace: RoutingTrace, prompt: int) -> None:
    lengths = (np.diff(trace.starts) + prompt).tolist()
    trace = made_up_trace(trace.spec, lengths)
    told = Told("toy", num_experts=trace.spec.num_experts)
    assert same(read(tmp_path / "x.jsonl", inference(trace, prompt), told).trace, bare(trace))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(traces(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
def test_micro_batches_come_back(
    tmp_path: Path, trace: RoutingTrace, batch: int, passes_a_step: int, length: int
) -> None:
    trace = made_up_trace(trace.spec, [length] * 6)
    told = Told("toy", num_experts=trace.spec.num_experts, micro_batch=batch)
    imported = read(tmp_path / "x.jsonl", training(trace, batch, passes_a_step), told)
    assert same(imported.trace, bare(trace))


def test_records_that_name_no_block_are_of_the_decoder(tmp_path: Path) -> None:
    records = inference(made_up_trace(lengths=(4,)), 2)
    for item in records:
        del item["block"]
    assert read(tmp_path / "x.jsonl", records).trace.num_tokens == 4


def test_a_step_that_is_missing_ends_a_sequence(tmp_path: Path) -> None:
    records = [item for item in inference(made_up_trace(lengths=(6,)), 2) if item["step"] != 2]
    assert read(tmp_path / "x.jsonl", records).trace.starts.tolist() == [0, 3, 5]


GOOD = inference(made_up_trace(lengths=(5,)), 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": None}, "step is None, expected a number"),
        ({"layer": -1}, "layer is -1"),
        ({"num_tokens": 1 << 60}, "num_tokens is 1152921504606846976, expected a number"),
        ({"num_tokens": 2}, r"top_indices is int64 \[3, 2\], expected expert ids \[2, 2\]"),
        ({"topk": 8}, r"expected expert ids \[3, 8\]"),
        ({"top_indices": None}, r"top_indices is object \[\]"),
        ({"top_indices": [[1, 2], [3]]}, "top_indices: .*inhomogeneous"),
        ({"top_indices": [[0.5, 1]] * 3}, "top_indices is float64"),
        ({"top_indices": [[1 << 40, 1]] * 3}, "expected expert ids"),
        ({"top_indices": [[8, 1]] * 3}, r"token 0, layer 3: expert id is 8.*logical ids"),
        ({"top_indices": [[1, 1]] * 3}, "expert 1 is routed twice"),
        ({"layer": 5}, r"step 0 has passes of \[3, 3\] tokens in layer 5, but of \[3\] in layer 1"),
        ({"num_tokens": 1, "top_indices": [[1, 2]]}, r"passes of \[1\] tokens in layer 3"),
        ({"topk": 1, "top_indices": [[1]] * 3}, r"have topk \[1, 2\], expected one"),
    ],
)
def test_an_odd_record_is_refused_with_its_line(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        read(tmp_path / "x.jsonl", [GOOD[0], {**GOOD[1], **change}, *GOOD[2:]])
    assert f"{tmp_path / 'x.jsonl'}, line" in refusal.value.message


@pytest.mark.parametrize(
    ("records", "told", "reason"),
    [
        pytest.param(
            training(made_up_trace(lengths=(3, 3)), 1, 1),
            EIGHT,
            "a pass of 3 tokens follows .*--micro-batch",
            id="two",
        ),
        pytest.param(
            GOOD[:-1], EIGHT, r"step 2 has layers \[1, 3\], expected those of step 0: \[1, 3, 5\]", id="cut"
        ),
        pytest.param(
            GOOD, Told("toy", 8, micro_batch=2), "3 tokens, expected a multiple of 2", id="micro-batch"
        ),
        pytest.param(
            GOOD, Told("toy", 8, micro_batch=0), "--micro-batch is 0, expected 1 or more", id="none"
        ),
        pytest.param(
            [record(0, 0, np.eye(2, dtype=int), "mtp")], EIGHT, "no records of the decoder", id="mtp"
        ),
        pytest.param([], EIGHT, "no records of the decoder", id="empty"),
        pytest.param(GOOD, Told("toy"), "--num-experts", id="experts"),
        pytest.param(GOOD, Told(None, 8), "--model", id="model"),
    ],
)
def test_what_makes_no_sequences_is_refused(
    tmp_path: Path, records: Records, told: Told, reason: str
) -> None:
    with pytest.raises(TraceError, match=reason):
        read(tmp_path / "x.jsonl", records, told)


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"step": ')
    with pytest.raises(TraceFormatError, match="line 1: no JSON"):
        router_trace.read(tmp_path / "x.jsonl", EIGHT)
