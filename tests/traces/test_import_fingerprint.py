"""Examples of GPT-OSS-MoE-ExpertFingerprinting: experts, probabilities and domains come back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import FIXTURES, bare, made_up_trace, same, traces
from traces.errors import TraceError, TraceFormatError
from traces.importers import fingerprint
from traces.importers.told import Imported, Told
from traces.trace import RoutingTrace

EIGHT = Told("toy", num_experts=8)


def examples(
    trace: RoutingTrace, *, first: int = 4, per_item: int = 1, dense: int = 0
) -> list[dict[str, Any]]:
    """An example of each sequence; per_item: tokens in one object of router_data."""
    assert trace.gates is not None
    found = []
    for index, domain in enumerate(trace.domains):
        tokens = {}
        for place, token in enumerate(range(*trace.sequence(index).indices(trace.num_tokens)), first):
            tokens[f"token_{place}"] = {
                f"layer_{layer + dense}": {
                    "selected_experts": trace.experts[token, layer].tolist(),
                    "selected_probs": trace.gates[token, layer].tolist(),
                }
                for layer in range(trace.spec.num_layers)
            }
        names = list(tokens)
        items = [
            {name: tokens[name] for name in names[at : at + per_item]}
            for at in range(0, len(names), per_item)
        ]
        found.append({"category": domain, "router_data": items})
    return found


def read(path: Path, found: Any, told: Told = EIGHT) -> Imported:
    path.write_text(json.dumps(found))
    return fingerprint.read(path, told)


def test_the_fixture_is_what_it_says() -> None:
    trace = fingerprint.read(FIXTURES / "fingerprint.json", Told("toy", num_experts=4)).trace
    assert trace.experts.tolist() == [[[3, 1], [2, 0]], [[1, 2], [0, 3]], [[2, 3], [1, 0]]]
    assert trace.gates is not None
    assert trace.gates[2].tolist() == [[0.5625, 0.4375], [1, 0]]
    assert (trace.starts.tolist(), trace.domains) == ([0, 2, 3], ("gpqa_diamond/Genetics",) * 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(traces(), st.integers(0, 9), st.integers(1, 3), st.integers(0, 2))
def test_what_was_routed_comes_back(
    tmp_path: Path, trace: RoutingTrace, first: int, per_item: int, dense: int
) -> None:
    trace = made_up_trace(trace.spec, np.diff(trace.starts).tolist())
    found = examples(trace, first=first, per_item=per_item, dense=dense)
    imported = read(tmp_path / "x.json", found, Told("toy", num_experts=trace.spec.num_experts))
    assert same(imported.trace, replace(bare(trace, gates=True), domains=trace.domains))


def test_scores_of_all_experts_tell_how_many_there_are(tmp_path: Path) -> None:
    found = examples(made_up_trace())
    found[0]["router_data"][0]["token_4"]["layer_0"]["full_scores"] = [0.1] * 8
    assert read(tmp_path / "x.json", found, Told("toy")).trace.spec.num_experts == 8


def test_an_example_of_no_source_is_of_an_unknown_domain(tmp_path: Path) -> None:
    (example,) = examples(made_up_trace(lengths=(2,)))
    del example["category"]
    assert read(tmp_path / "x.json", example).trace.domains == ("unknown",)


def test_lines_are_examples_too(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps(example) + "\n" for example in examples(made_up_trace()))
    )
    assert fingerprint.read(tmp_path / "x.jsonl", EIGHT).trace.num_sequences == 3


GOOD = examples(made_up_trace(lengths=(2, 3)))


def at_token(change: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """GOOD, but for token_5 of the second example."""
    found = copy.deepcopy(GOOD)
    change(found[1]["router_data"][1]["token_5"])
    return found


def cell(**values: Any) -> list[dict[str, Any]]:
    return at_token(lambda token: token["layer_2"].update(values))


def items(change: Callable[[list[Any]], Any]) -> list[dict[str, Any]]:
    return [GOOD[0], {"router_data": change(GOOD[1]["router_data"])}]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        pytest.param(
            cell(selected_experts=[1]),
            r"token_5, layer_2: selected_experts has 1 numbers, expected 2",
            id="few",
        ),
        pytest.param(cell(selected_experts=["a", 1]), r"is \['a', 1\], expected numbers", id="text"),
        pytest.param(cell(selected_experts=[0.5, 1]), "expected numbers", id="fraction"),
        pytest.param(cell(selected_experts=[True, 2]), "expected numbers", id="true"),
        pytest.param(
            cell(selected_experts=[8, 1]), "token 1, layer 2: expert id is 8.*logical ids", id="beyond"
        ),
        pytest.param(cell(selected_experts=[1 << 70, 1]), "too large", id="huge"),
        pytest.param(cell(selected_experts=[1, 1]), "expert 1 is routed twice", id="twice"),
        pytest.param(cell(selected_probs=None), "selected_probs is None", id="no probabilities"),
        pytest.param(cell(selected_probs=[float("nan"), 1]), "gate is nan", id="nan"),
        pytest.param(cell(selected_probs=[-0.5, 1]), "gate is -0.5", id="negative"),
        pytest.param(cell(selected_probs=[1e300, 1]), "gate is inf", id="large"),
        pytest.param(cell(selected_probs=[10**400, 1]), "too large", id="endless"),
        pytest.param(
            at_token(lambda token: token.pop("layer_1")), r"has 2 layers, expected 3: \[0, 1, 2\]", id="layer"
        ),
        pytest.param(
            at_token(lambda token: token.update(layer=3)), "has 'layer', expected layer_N", id="name"
        ),
        pytest.param(at_token(lambda token: token.clear()), "token_5 is no object of layers", id="empty"),
        pytest.param(items(lambda rows: [rows[1], rows[0]]), "found 'token_4' after token_5", id="order"),
        pytest.param(items(lambda rows: [{"word_4": {}}]), "found 'word_4'", id="no token"),
        pytest.param(items(lambda rows: [3]), "no list of objects", id="a number"),
        pytest.param(items(lambda rows: None), "router_data is missing", id="missing"),
    ],
)
def test_an_odd_example_is_refused_with_its_place(tmp_path: Path, found: Any, reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        read(tmp_path / "x.json", found)
    assert f"{tmp_path / 'x.json'}, item 1" in refusal.value.message


def test_a_file_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has no tokens in router_data"):
        read(tmp_path / "x.json", [{"router_data": []}])


@pytest.mark.parametrize(("told", "option"), [(Told("toy"), "--num-experts"), (Told(None, 8), "--model")])
def test_what_the_file_does_not_say_must_be_told(tmp_path: Path, told: Told, option: str) -> None:
    with pytest.raises(TraceFormatError, match=option):
        read(tmp_path / "x.json", GOOD, told)
