"""Responses of vLLM: what is in them comes out, and what is odd in them is refused by its line."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import FIXTURES, bare, made_up_trace, same, traces, with_dense
from traces.errors import TraceError, TraceFormatError
from traces.importers import json_records, packed, vllm
from traces.importers.completions import NO_EXPERTS
from traces.importers.recorded import NO_ROUTING
from traces.importers.told import Imported, Told
from traces.trace import RoutingTrace

EIGHT = Told(num_experts=8)


def npy(array: np.ndarray) -> str:
    """As vLLM encodes it: base64 of what numpy.save writes."""
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def answers(
    trace: RoutingTrace, *, prompt: int = 1, dtype: Any = np.uint8, dense: Sequence[int] = (), cached: int = 0
) -> list[dict[str, Any]]:
    """Responses that the sequences of a trace would have come in: as many `cached` tokens before each."""
    found = []
    for index in range(trace.num_sequences):
        tokens = trace.sequence(index)
        experts = with_dense(trace.experts[tokens].astype(dtype), dense)
        experts = np.concatenate([np.full((cached, *experts.shape[1:]), np.array(-1).astype(dtype)), experts])
        choice: dict[str, Any] = {"index": 0, "text": "", "routed_experts": npy(experts)}
        answer: dict[str, Any] = {"model": f"toys/{trace.spec.model}", "choices": [choice]}
        if trace.token_ids is not None:
            ids = [7] * cached + trace.token_ids[tokens].tolist() + [9]  # the last was never put in
            at = min(prompt + cached, len(ids))
            answer["prompt_token_ids"], choice["token_ids"] = ids[:at], ids[at:]
        found.append(answer)
    return found


def write(path: Path, found: Sequence[Any]) -> Path:
    text = "".join(json.dumps(answer) + "\n" for answer in found)
    path.write_text(text if path.suffix == ".jsonl" else json.dumps(found))
    return path


def read(path: Path, found: Sequence[Any], told: Told = EIGHT) -> Imported:
    return vllm.read(write(path, found), told)


def test_the_fixture_is_what_its_responses_say() -> None:
    imported = vllm.read(FIXTURES / "vllm.jsonl", Told(num_experts=4))
    trace = imported.trace
    assert (trace.spec.model, trace.spec.num_layers, trace.spec.num_experts) == ("Toy-MoE", 2, 4)
    assert trace.starts.tolist() == [0, 3, 5]
    assert trace.experts[:, 0].tolist() == [[3, 1], [1, 2], [2, 3], [0, 1], [2, 1]]
    assert trace.token_ids is not None
    assert trace.token_ids.tolist() == [11, 12, 13, 15, 16]
    assert imported.notes == {NO_ROUTING: 2, NO_EXPERTS: 1}
    assert imported.dense == (0,)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    traces(),
    st.sampled_from([np.uint8, np.uint16, np.int16, np.int32]),
    st.sets(st.integers(0, 3), max_size=2),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([".json", ".jsonl"]),
)
def test_what_was_routed_comes_back(
    tmp_path: Path,
    trace: RoutingTrace,
    dtype: Any,
    dense: set[int],
    cached: int,
    prompt: int,
    suffix: str,
) -> None:
    dense = {place for place in dense if place <= trace.spec.num_layers}
    assume((trace.experts != 0).any(axis=(0, 2)).all())  # top-1 layers of zeros pass for dense ones
    found = answers(trace, prompt=prompt, dtype=dtype, dense=sorted(dense), cached=cached)
    imported = read(tmp_path / f"x{suffix}", found, Told(num_experts=trace.spec.num_experts))
    assert same(imported.trace, bare(trace, token_ids=trace.token_ids is not None))
    assert imported.dense == tuple(sorted(dense))
    assert imported.notes[NO_ROUTING] == cached * trace.num_sequences


def test_lists_of_numbers_are_read_with_those_of_the_prompt(tmp_path: Path) -> None:
    trace = made_up_trace(lengths=(5,))
    assert trace.token_ids is not None
    ids = trace.token_ids.tolist()
    answer = {
        "model": "toy",
        "prompt_routed_experts": trace.experts[:2].tolist(),
        "prompt_token_ids": ids[:2],
        "choices": [{"token_ids": [*ids[2:], 9], "routed_experts": trace.experts[2:].tolist()}],
    }
    assert same(read(tmp_path / "x.json", [answer]).trace, bare(trace, token_ids=True))


def test_routing_that_begins_within_the_prompt_ends_with_the_completion(tmp_path: Path) -> None:
    trace = made_up_trace(lengths=(5,))
    (answer,) = answers(trace, prompt=3)
    answer["choices"][0]["routed_experts"] = npy(trace.experts[2:])
    token_ids = read(tmp_path / "x.json", [answer]).trace.token_ids
    assert token_ids is not None and trace.token_ids is not None
    assert np.array_equal(token_ids, trace.token_ids[2:])


def test_tokens_of_the_prompt_are_unknown_where_only_the_completions_are_told(tmp_path: Path) -> None:
    (answer,) = answers(made_up_trace(lengths=(4,)), prompt=2)
    del answer["prompt_token_ids"]
    token_ids = read(tmp_path / "x.json", [answer]).trace.token_ids
    assert token_ids is not None
    assert token_ids.tolist() == [-1, -1, *answer["choices"][0]["token_ids"][:2]]


def test_a_gap_ends_a_sequence(tmp_path: Path) -> None:
    trace = made_up_trace(lengths=(5,))
    experts = trace.experts.copy()
    experts[2] = -1
    answer = {"model": "toy", "choices": [{"routed_experts": npy(experts)}]}
    imported = read(tmp_path / "x.json", [answer])
    assert imported.trace.starts.tolist() == [0, 2, 4]
    assert imported.notes[NO_ROUTING] == 1


def test_255_is_an_expert_where_there_are_256(tmp_path: Path) -> None:
    experts = np.array([[[255, 3]], [[255, 255]], [[1, 255]]], np.uint8)
    answer = {"model": "toy", "choices": [{"routed_experts": npy(experts)}]}
    imported = read(tmp_path / "x.json", [answer], Told(num_experts=256))
    assert imported.trace.experts.tolist() == [[[255, 3]], [[1, 255]]]


def test_a_told_name_goes_before_that_of_the_responses(tmp_path: Path) -> None:
    found = [{**answer, "model": name} for answer, name in zip(answers(made_up_trace()), "abc", strict=True)]
    assert read(tmp_path / "x.json", found, Told("mine", 8)).trace.spec.model == "mine"


def changed(**choice: Any) -> dict[str, Any]:
    (answer,) = answers(made_up_trace(lengths=(3,)))
    answer["choices"][0].update(choice)
    return answer


def claiming(shape: tuple[int, ...], descr: str = "|u1", data: bytes = b"") -> str:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    packed_header = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    return base64.b64encode(packed_header + data).decode()


EXPERTS = made_up_trace(lengths=(3,)).experts


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(changed(routed_experts="@@"), "no base64", id="no base64"),
        pytest.param(changed(routed_experts="AAAA"), "magic string", id="no npy"),
        pytest.param(
            changed(routed_experts=claiming((1 << 50, 48, 8))),
            r"claims to be \[1125899906842624, 48, 8\]",
            id="huge",
        ),
        pytest.param(
            changed(routed_experts=claiming((2, 1, 2), data=b"abc")), "but 3 bytes are there", id="cut"
        ),
        pytest.param(changed(routed_experts=claiming((-1, 1, 1))), "claims to be", id="negative shape"),
        pytest.param(
            changed(routed_experts=claiming((1,), "|O")), "is object, expected integers", id="pickled"
        ),
        pytest.param(changed(routed_experts=npy(EXPERTS / 2)), "expected integers", id="floats"),
        pytest.param(
            changed(routed_experts=npy(EXPERTS[0])), r"int16 \[3, 2\], expected integers \[tok", id="flat"
        ),
        pytest.param(changed(routed_experts=[[[1, 2]], [[1]]]), "inhomogeneous", id="ragged"),
        pytest.param(changed(routed_experts=[[["1"]]]), "expected integers", id="strings"),
        pytest.param(changed(routed_experts=7), "expected integers", id="a number"),
        pytest.param(
            changed(routed_experts=npy(EXPERTS + 7)),
            r"choice 0: token 0, layer 0: expert id is \d+, .* logical ids",
            id="physical ids",
        ),
        pytest.param(
            changed(routed_experts=npy(EXPERTS - 2)), "expert id is -[12], expected 0 to 7", id="negative"
        ),
        pytest.param(
            changed(routed_experts=npy(np.concatenate([EXPERTS, EXPERTS]))),
            "6 tokens, expected 3 at most",
            id="long",
        ),
        pytest.param(changed(token_ids=["a"]), "token_ids is not a list of token ids", id="text for ids"),
        pytest.param(changed(token_ids=[-1, 2]), "token_ids is not a list", id="negative token id"),
        pytest.param({"model": "toy"}, "no list of choices", id="an error"),
        pytest.param({"model": "toy", "choices": [3]}, "no list of choices", id="choices"),
        pytest.param({**changed(), "model": None}, "does not name its model.*--model NAME", id="no name"),
        pytest.param(
            {**changed(), "model": "other"}, "the model is 'other', expected 'toy'", id="two models"
        ),
        pytest.param([1], "found list, expected an object", id="a list"),
        pytest.param(
            {**changed(), "prompt_routed_experts": [[[1]]]},
            r"\[1, 1, 1\], .*expected the same layers",
            id="two shapes",
        ),
        pytest.param(
            {**changed(), "prompt_routed_experts": EXPERTS[:1].tolist(), "prompt_token_ids": [1, 2]},
            "prompt_token_ids has 2 tokens, but the routing beside it 1",
            id="prompt of another length",
        ),
    ],
)
def test_an_odd_response_is_refused_with_its_line(tmp_path: Path, answer: Any, reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        read(tmp_path / "x.jsonl", [*answers(made_up_trace(lengths=(3,))), answer])
    assert f"{tmp_path / 'x.jsonl'}, line 2" in refusal.value.message


def test_a_token_routed_in_some_layers_only_is_refused(tmp_path: Path) -> None:
    experts = EXPERTS.copy()
    experts[1, 2] = -1
    with pytest.raises(TraceError, match="line 1, choice 0: token 1 has no routing in layer 2"):
        read(tmp_path / "x.jsonl", [changed(routed_experts=npy(experts))])


def test_an_expert_routed_twice_is_refused(tmp_path: Path) -> None:
    experts = EXPERTS.copy()
    experts[2, 1] = 5
    with pytest.raises(TraceError, match="line 1, choice 0: token 2, layer 1: expert 5 is routed twice"):
        read(tmp_path / "x.jsonl", [changed(routed_experts=npy(experts))])


def test_responses_without_routing_are_refused_with_the_servers_option(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no response of it.*--enable-return-routed-experts"):
        read(tmp_path / "x.jsonl", [changed(routed_experts=None)])


def test_routing_from_a_cache_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has no routing of any token"):
        read(tmp_path / "x.jsonl", [changed(routed_experts=npy(np.full((3, 3, 2), -1)))])


def test_the_number_of_experts_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match=r"how many experts a layer has\. Tell it: --num-experts N"):
        read(tmp_path / "x.jsonl", [changed()], Told())


def test_text_that_is_no_json_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", answers(made_up_trace()))
    path.write_text(path.read_text() + '\n{"model": ')
    with pytest.raises(TraceFormatError, match=r"x\.jsonl, line 5: no JSON"):
        vllm.read(path, EIGHT)
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(TraceFormatError, match=r"x\.json, its JSON: no JSON"):
        vllm.read(tmp_path / "x.json", EIGHT)


@pytest.mark.parametrize(
    ("limit", "reason"), [("MAX_BYTES", "100 at most"), ("MAX_JSON_BYTES", "more than 100")]
)
def test_what_is_beyond_a_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str
) -> None:
    monkeypatch.setattr(json_records, limit, 100)
    with pytest.raises(TraceFormatError, match=reason):
        read(tmp_path / "x.jsonl", [changed()])


def test_an_unknown_version_of_npy_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("array format (9, 0) is unknown")):
        packed.npy_header(io.BytesIO(b"\x93NUMPY\x09\x00"))
