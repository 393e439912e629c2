"""Responses of SGLang: bare integers whose shape is told, checked by the response's count of tokens."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import FIXTURES, bare, made_up_trace, same, traces, with_dense
from traces.errors import TraceError, TraceFormatError
from traces.importers import sglang
from traces.importers.completions import NO_EXPERTS
from traces.importers.recorded import NO_ROUTING
from traces.importers.told import Imported, Told
from traces.trace import RoutingTrace

TOLD = Told("toy", num_experts=8, num_layers=3, top_k=2)
CODES = {"int32": "<i", "uint16": "<H", "uint8": "<B"}


def packed(experts: np.ndarray, dtype: str = "int32") -> str:
    """Number by number, without numpy's own bytes."""
    return base64.b64encode(b"".join(struct.pack(CODES[dtype], int(n)) for n in experts.flat)).decode()


def answers(
    trace: RoutingTrace,
    *,
    prompt: int = 1,
    dtype: str | None = None,
    dense: Sequence[int] = (),
    place: str = "meta_info",
) -> list[dict[str, Any]]:
    found = []
    for index in range(trace.num_sequences):
        tokens = trace.sequence(index)
        experts = with_dense(trace.experts[tokens], dense)
        at = min(prompt, len(experts))
        counts = {"prompt_tokens": at, "completion_tokens": len(experts) + 1 - at}
        fields: dict[str, Any] = {"routed_experts": packed(experts, dtype or "int32")}
        if dtype is not None:
            fields["routed_experts_dtype"] = dtype
        answer: dict[str, Any] = {"usage": counts, "choices": [{"text": ""}], "model": trace.spec.model}
        if place == "choice":
            answer["choices"][0]["sgl_ext"] = fields
        elif place == "sglext":
            answer["sglext"] = fields
        else:
            answer = {"text": "", "meta_info": {**fields, **counts}}
            if trace.token_ids is not None:
                ids = trace.token_ids[tokens].tolist()
                answer["meta_info"]["input_token_logprobs"] = [[-1.0, token, None] for token in ids[:at]]
                answer["output_ids"] = [*ids[at:], 9]
        found.append(answer)
    return found


def read(path: Path, found: Sequence[Any], told: Told = TOLD) -> Imported:
    path.write_text("".join(json.dumps(answer) + "\n" for answer in found))
    return sglang.read(path, told)


def test_the_fixture_is_what_its_responses_say() -> None:
    imported = sglang.read(FIXTURES / "sglang.jsonl", Told("toy", 4, 3, 2))
    trace = imported.trace
    assert (trace.spec.num_layers, trace.starts.tolist()) == (2, [0, 3, 5])
    assert trace.experts[:, 1].tolist() == [[2, 0], [0, 3], [1, 0], [2, 0], [0, 3]]
    assert trace.token_ids is not None
    assert trace.token_ids.tolist() == [11, 12, 13, -1, 16]
    assert imported.dense == (0,)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    traces(),
    st.sampled_from([None, "int32", "uint16", "uint8"]),
    st.sets(st.integers(0, 3), max_size=2),
    st.integers(0, 3),
    st.sampled_from(["meta_info", "sglext", "choice"]),
)
def test_what_was_routed_comes_back(
    tmp_path: Path, trace: RoutingTrace, dtype: str | None, dense: set[int], prompt: int, place: str
) -> None:
    dense = {layer for layer in dense if layer <= trace.spec.num_layers}
    assume((trace.experts != 0).any(axis=(0, 2)).all())  # top-1 layers of zeros pass for dense ones
    found = answers(trace, prompt=prompt, dtype=dtype, dense=sorted(dense), place=place)
    spec = trace.spec
    told = Told("toy", spec.num_experts, spec.num_layers + len(dense), spec.top_k)
    imported = read(tmp_path / "x.jsonl", found, told)
    with_ids = trace.token_ids is not None and place == "meta_info"
    assert same(imported.trace, bare(trace, token_ids=with_ids))
    assert imported.dense == tuple(sorted(dense))


def test_places_never_written_are_left_out(tmp_path: Path) -> None:
    trace = made_up_trace(lengths=(4,), token_ids=False)
    trace.experts[1] = 0
    imported = read(tmp_path / "x.jsonl", answers(trace))
    assert imported.trace.starts.tolist() == [0, 1, 3]
    assert imported.notes == {NO_ROUTING: 1, NO_EXPERTS: 0}


def test_prompt_tokens_are_unknown_where_only_those_of_the_output_are_told(tmp_path: Path) -> None:
    (answer,) = answers(made_up_trace(lengths=(4,)), prompt=2)
    del answer["meta_info"]["input_token_logprobs"]
    token_ids = read(tmp_path / "x.jsonl", [answer]).trace.token_ids
    assert token_ids is not None
    assert token_ids.tolist() == [-1, -1, *answer["output_ids"][:2]]


def test_a_completion_without_routing_is_counted(tmp_path: Path) -> None:
    found = [*answers(made_up_trace()), {"text": "", "meta_info": {"prompt_tokens": 1}}]
    assert read(tmp_path / "x.jsonl", found).notes[NO_EXPERTS] == 1


EXPERTS = made_up_trace(lengths=(3,)).experts


def changed(**fields: Any) -> dict[str, Any]:
    (answer,) = answers(made_up_trace(lengths=(3,)))
    answer["meta_info"].update(fields)
    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(changed(routed_experts="A"), "no base64", id="no base64"),
        pytest.param(changed(routed_experts=[1]), "is no text, expected base64", id="a list"),
        pytest.param(changed(routed_experts="AAAA"), "has 3 bytes, expected a multiple of 24", id="cut"),
        pytest.param(
            changed(routed_experts=packed(EXPERTS[:2])), "has 2 tokens .*expected 3: 1 of", id="few"
        ),
        pytest.param(changed(routed_experts_start_len=1), "expected 2: .* and the first 1", id="start"),
        pytest.param(changed(routed_experts_start_len=-1), "start_len is -1, expected a number", id="before"),
        pytest.param(changed(completion_tokens="3"), "completion_tokens is '3'", id="count"),
        pytest.param(
            changed(routed_experts_dtype="object"), "dtype is 'object', expected one of", id="dtype"
        ),
        pytest.param(changed(input_token_logprobs=[3]), "no list of .probability, token id", id="ids"),
        pytest.param(
            changed(routed_experts=packed(EXPERTS + 7)), r"expert id is \d+, .*logical ids", id="physical ids"
        ),
    ],
)
def test_an_odd_response_is_refused_with_its_line(tmp_path: Path, answer: Any, reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        read(tmp_path / "x.jsonl", [*answers(made_up_trace(lengths=(3,))), answer])
    assert f"{tmp_path / 'x.jsonl'}, line 2" in refusal.value.message


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (Told("toy", 8, 6, 2), "has 4 tokens of 6 layers and top-2, expected 8"),
        (Told("toy", 8, 3, 4), "has 4 tokens of 3 layers and top-4, expected 8"),
        (Told("toy", 8, 5, 2), "has 192 bytes, expected a multiple of 40"),
        (Told("toy", 8, None, 2), "--num-layers"),
        (Told("toy", 8, 3, None), "--top-k"),
        (Told("toy", 8, 0, 2), "--num-layers is 0, expected 1 or more"),
        (Told(None, 8, 3, 2), "does not name its model"),
    ],
)
def test_a_shape_that_is_not_the_responses_is_refused(tmp_path: Path, told: Told, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        read(tmp_path / "x.jsonl", answers(made_up_trace(lengths=(8,))), told)


def test_responses_without_routing_are_refused_with_the_servers_option(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no response of it.*--enable-return-routed-experts"):
        read(tmp_path / "x.jsonl", [{"error": "no"}])
    with pytest.raises(TraceFormatError, match="line 1: found list"):
        read(tmp_path / "x.jsonl", [[]])
