"""The layouts of llama-moe-trace: generated tokens come back, prompts are left out, odd lines are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import FIXTURES, bare, made_up_trace, same, traces
from traces.errors import TraceError, TraceFormatError
from traces.importers import csv_columns, moe_trace
from traces.importers.moe_trace import NOT_THE_PROMPT
from traces.importers.told import Imported, Told
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace

EIGHT = Told("toy", num_experts=8)
Layout = Callable[[RoutingTrace, int], list[str]]
DENSE = 2  # layers before the first with experts


def prompt_of(trace: RoutingTrace, tokens: int, layer: int) -> np.ndarray:
    """Experts of a prompt, of its last token alone in the last layer."""
    last = layer == trace.spec.num_layers - 1
    return np.tile(np.arange(trace.spec.top_k), (1 if last else tokens, 1))


def by_expert(trace: RoutingTrace, prompt: int) -> list[str]:
    lines = []
    for index in range(trace.num_sequences):
        for layer in range(trace.spec.num_layers if prompt else 0):
            lines += [f"{layer + DENSE},{expert}" for expert in prompt_of(trace, prompt, layer).flat]
        for token in trace.experts[trace.sequence(index)]:
            lines += [
                f"{layer + DENSE},{expert}" for layer, experts in enumerate(token) for expert in experts
            ]
    return lines


def by_layer(trace: RoutingTrace, prompt: int) -> list[str]:
    lines = []
    for index in range(trace.num_sequences):
        for layer in range(trace.spec.num_layers):
            rows = prompt_of(trace, prompt, layer)[:prompt]
            for token, experts in enumerate(rows):
                lines.append(",".join(map(str, [token - len(rows), layer + DENSE, *experts])))
        for pos, token in enumerate(trace.experts[trace.sequence(index)]):
            lines += [
                ",".join(map(str, [pos, layer + DENSE, *experts])) for layer, experts in enumerate(token)
            ]
    return lines


def by_rank(trace: RoutingTrace, prompt: int) -> list[str]:
    """Of one sequence: this layout has no more."""
    lines = ["phase,token,layer,rank,expert"]
    for layer in range(trace.spec.num_layers if prompt else 0):
        for token, experts in enumerate(prompt_of(trace, prompt, layer)):
            lines += [
                f"prefill,{token},{layer + DENSE},{rank},{expert}" for rank, expert in enumerate(experts)
            ]
    for token, layers in enumerate(trace.experts[trace.sequence(0)]):
        for layer, experts in enumerate(layers):
            lines += [
                f"decode,{token + prompt},{layer + DENSE},{rank},{expert}"
                for rank, expert in enumerate(experts)
            ]
    return lines


def read(path: Path, lines: list[str], told: Told = EIGHT) -> Imported:
    path.write_text("".join(f"{line}\n" for line in lines))
    return moe_trace.read(path, told)


def test_the_fixture_is_what_its_lines_say() -> None:
    imported = moe_trace.read(FIXTURES / "moe_trace.csv", Told("toy", num_experts=4))
    assert imported.trace.experts.tolist() == [[[3, 1], [2, 0]], [[1, 2], [0, 3]]]
    assert imported.notes == {NOT_THE_PROMPT: 2}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(traces(), st.sampled_from([by_expert, by_layer, by_rank]), st.sampled_from([0, 2, 5]))
def test_generated_tokens_come_back(tmp_path: Path, trace: RoutingTrace, layout: Layout, prompt: int) -> None:
    if layout is by_rank or not prompt:
        trace = trace.select([0])
    assume(layout is not by_expert or trace.spec.num_layers > 1)
    told = Told("toy", num_experts=trace.spec.num_experts)
    imported = read(tmp_path / "x.csv", layout(trace, prompt), told)
    assert same(imported.trace, bare(trace))
    # A prompt in a model of one layer has its last token alone.
    seen = min(prompt, 1) if trace.spec.num_layers == 1 else prompt
    assert imported.notes[NOT_THE_PROMPT] == seen * trace.num_sequences


@pytest.mark.parametrize("layout", [by_expert, by_layer, by_rank])
def test_each_layout_is_told_by_its_look(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "x.csv"
    read(path, layout(made_up_trace(lengths=(3,)), 2))
    assert moe_trace.is_moe_trace(path)
    path.write_text("# route_trace v1\n")
    assert not moe_trace.is_moe_trace(path)


def test_a_prompt_of_one_token_is_a_token_like_others_where_none_is_marked(tmp_path: Path) -> None:
    trace = made_up_trace(lengths=(3,))
    assert read(tmp_path / "x.csv", by_expert(trace, 1)).trace.num_tokens == 4


GOOD = made_up_trace(lengths=(4,))
WIDE = made_up_trace(RoutingSpec("toy", 2, 8, 4), (4,))


def put(at: int, line: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[:at], line, *lines[at + 1 :]]


def cut(start: int, stop: int | None = None) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[:start], *(lines[stop:] if stop else [])]


@pytest.mark.parametrize(
    ("layout", "change", "reason"),
    [
        pytest.param(by_expert, put(14, "2,8"), "line 15: expert 8, .*logical ids", id="A id"),
        pytest.param(by_expert, put(8, "2,-1"), "line 9: expert -1, expected 0 or more", id="A negative"),
        pytest.param(by_expert, put(8, "x,1"), "line 9: .*invalid value 'x'", id="A text"),
        pytest.param(by_expert, put(8, "2"), "line 9: Expected 2 columns, got 1", id="A column"),
        pytest.param(by_expert, put(8, "40000,1"), "no generated token|line 9: layer 40000", id="A layer"),
        pytest.param(by_expert, cut(6), "one layer only", id="A one layer"),
        pytest.param(by_expert, cut(18), r"the step has 4 rows, the last of them here", id="A cut short"),
        pytest.param(by_layer, put(12, "0,2,1,8"), "line 13: expert 8, expected 0 to 7", id="B id"),
        pytest.param(by_layer, put(9, "0,4,1,1"), r"line 10 .*routes to expert 1 twice", id="B twice"),
        pytest.param(by_layer, put(9, "0,3,1,2"), r"line 10 .*layer 3, slot 0 again", id="B again"),
        pytest.param(by_layer, put(9, "0,4,1"), "line 10: Expected 4 columns, got 3", id="B column"),
        pytest.param(by_layer, cut(10, 13), "comes after step 0, expected step 1 between", id="B gap"),
        pytest.param(by_layer, cut(9, 10), "the step has 4 rows", id="B layer"),
        pytest.param(by_layer, cut(7), "has no generated token", id="B prompt only"),
        pytest.param(by_rank, put(13, "decode,2,2,0,8"), "line 14: expert 8, expected 0 to 7", id="C id"),
        pytest.param(by_rank, put(13, "verify,2,2,0,1"), "line 14: phase 'verify', expected", id="C phase"),
        pytest.param(by_rank, put(13, "decode,-2,2,0,1"), "line 14: token -2, expected 0", id="C token"),
        pytest.param(by_rank, put(13, "decode,3,2,9,1"), "line 14: rank 9, expected 0 to 7", id="C rank"),
        pytest.param(by_rank, cut(16, 17), "the step has 5 rows", id="C slot"),
        pytest.param(by_rank, cut(1), "(?i)empty|no rows", id="C names only"),
    ],
)
def test_an_odd_file_is_refused_with_its_line(
    tmp_path: Path, layout: Layout, change: Callable[[list[str]], list[str]], reason: str
) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        read(tmp_path / "x.csv", change(layout(GOOD, 3)))
    assert refusal.value.message.startswith(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_file_cut_within_a_layer_is_refused(tmp_path: Path, lines: int) -> None:
    with pytest.raises(TraceError, match=r"no generated token|expected a multiple of"):
        read(tmp_path / "x.csv", by_expert(WIDE, 3)[:-lines])


@pytest.mark.parametrize("text", ["", "a,b\n", "layer\n1\n", "\xff"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(TraceFormatError, match=r"x\.csv"):
        moe_trace.read(tmp_path / "x.csv", EIGHT)


@pytest.mark.parametrize(("told", "option"), [(Told("toy"), "--num-experts"), (Told(None, 8), "--model")])
def test_what_the_file_does_not_say_must_be_told(tmp_path: Path, told: Told, option: str) -> None:
    with pytest.raises(TraceFormatError, match=option):
        read(tmp_path / "x.csv", by_layer(GOOD, 2), told)


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_columns, "MAX_BYTES", 100)
    with pytest.raises(TraceFormatError, match="100 at most are read"):
        read(tmp_path / "x.csv", by_rank(GOOD, 2))
