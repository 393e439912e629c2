"""Dumps of SGLang's recorder: batches of requests come apart again, and joints are never wrong."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import FIXTURES, bare, made_up_trace, same, traces
from traces.errors import TraceError, TraceFormatError
from traces.importers import sglang_recorder
from traces.importers.recorded import NO_ROUTING
from traces.importers.sglang_recorder import WITHIN
from traces.importers.told import Imported, Told
from traces.trace import RoutingTrace

NAMED = Told("toy")


def record(trace: RoutingTrace, parts: Sequence[tuple[int, int, int]], mode: int) -> dict[str, Any]:
    """A forward pass of tokens start:stop of some sequences; layer 0 is dense."""
    spec = trace.spec
    tokens = [int(trace.starts[index]) + at for index, start, stop in parts for at in range(start, stop)]
    ids = torch.full((spec.num_layers + 1, len(tokens), 8), -1, dtype=torch.int32)
    ids[1:, :, : spec.top_k] = torch.tensor(trace.experts[tokens].astype(np.int32)).permute(1, 0, 2)
    assert trace.token_ids is not None
    return {
        "forward_pass_id": 7,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": trace.token_ids[tokens].tolist(),
        "positions": [at for _, start, stop in parts for at in range(start, stop)],
        "extend_seq_lens": None if mode == 2 else [stop - start for _, start, stop in parts],
        "forward_mode": mode,
        "topk_ids_of_layer": ids,
        "misc_objects": [],
        "global_physical_count": torch.zeros(1, dtype=torch.int32),
    }


def served(trace: RoutingTrace, prompts: Sequence[int], arrivals: Sequence[int]) -> list[dict[str, Any]]:
    """The passes of a server that batches: prompts as they arrive, then a token of each running request."""
    lengths = np.diff(trace.starts).tolist()
    running: dict[int, int] = {}
    records, step, waiting = [], 0, sorted(range(len(lengths)), key=lambda index: (arrivals[index], index))
    while waiting or running:
        come = [index for index in waiting if arrivals[index] <= step]
        waiting = waiting[len(come) :]
        parts = [(index, 0, min(prompts[index], lengths[index])) for index in come]
        if parts:
            records.append(record(trace, parts, 1))
        running |= {index: stop for index, _, stop in parts}
        running = {index: at for index, at in running.items() if at < lengths[index]}
        if running:
            records.append(record(trace, [(index, at, at + 1) for index, at in running.items()], 2))
            running = {index: at + 1 for index, at in running.items()}
        step += 1
    return records


def write(path: Path, records: Sequence[Any], experts: int = 8, **others: Any) -> Path:
    mapped = torch.arange(experts).repeat(3, 1)
    torch.save({"records": list(records), "last_physical_to_logical_map": mapped, **others}, path)
    return path


def read(path: Path, records: Sequence[Any], **others: Any) -> Imported:
    return sglang_recorder.read(write(path, records, **others), NAMED)


def numbered(trace: RoutingTrace) -> RoutingTrace:
    return replace(trace, token_ids=np.arange(trace.num_tokens, dtype=np.int32))


def test_the_fixture_is_two_requests() -> None:
    imported = sglang_recorder.read(FIXTURES / "sglang_recorder.pt", NAMED)
    trace = imported.trace
    assert (trace.spec.num_layers, trace.spec.num_experts, trace.spec.top_k) == (2, 4, 2)
    assert trace.token_ids is not None
    assert (trace.token_ids.tolist(), trace.starts.tolist()) == ([11, 12, 13, 21, 22], [0, 3, 5])
    assert trace.experts[:, 0].tolist() == [[3, 1], [1, 2], [2, 3], [0, 1], [2, 1]]
    assert (imported.dense, imported.notes) == ((0,), {NO_ROUTING: 0, WITHIN: 0})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    traces(),
    st.lists(st.integers(1, 4), min_size=8, max_size=8),
    st.lists(st.integers(0, 9), min_size=8, max_size=8),
)
def test_tokens_are_all_there_and_no_two_requests_are_joined(
    tmp_path: Path, trace: RoutingTrace, prompts: list[int], arrivals: list[int]
) -> None:
    trace = numbered(trace)
    records = served(trace, prompts, arrivals)
    found = read(tmp_path / "x.pt", records, experts=trace.spec.num_experts).trace
    assert found.token_ids is not None
    assert sorted(found.token_ids.tolist()) == list(range(trace.num_tokens))
    assert np.array_equal(found.experts, trace.experts[found.token_ids])
    for index in range(found.num_sequences):
        ids = found.token_ids[found.sequence(index)]
        assert np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids)))
        whose = np.searchsorted(trace.starts, [ids[0], ids[-1]], side="right")
        assert whose[0] == whose[1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(traces(), st.integers(1, 4))
def test_requests_that_run_to_the_end_together_come_back_whole(
    tmp_path: Path, trace: RoutingTrace, prompt: int
) -> None:
    """All prompts of one length, all completions of one length."""
    trace = numbered(made_up_trace(trace.spec, [6] * trace.num_sequences))
    records = served(trace, [prompt] * 8, [0] * 8)
    imported = read(tmp_path / "x.pt", records, experts=trace.spec.num_experts)
    assert same(imported.trace, bare(trace, token_ids=True))
    assert imported.notes[WITHIN] == 0


def test_one_request_after_another_comes_back_whole(tmp_path: Path) -> None:
    trace = numbered(made_up_trace(lengths=(7, 5, 9)))
    imported = read(tmp_path / "x.pt", served(trace, [3, 2, 4], [0, 10, 20]))
    assert same(imported.trace, bare(trace, token_ids=True))


def test_a_token_that_may_be_of_two_requests_begins_a_sequence(tmp_path: Path) -> None:
    """The second of two requests alike ends first; what the other goes on with could be either's."""
    trace = numbered(made_up_trace(lengths=(6, 4)))
    imported = read(tmp_path / "x.pt", served(trace, [2, 2], [0, 0]))
    assert imported.trace.starts.tolist() == [0, 4, 8, 10]
    assert imported.notes[WITHIN] == 1


def test_a_prompt_in_pieces_and_one_from_a_cache_begin_within_a_text(tmp_path: Path) -> None:
    trace = numbered(made_up_trace(lengths=(6,)))
    records = [record(trace, [(0, 1, 3)], 1), record(trace, [(0, 3, 5)], 3), record(trace, [(0, 5, 6)], 2)]
    imported = read(tmp_path / "x.pt", records)
    assert imported.trace.starts.tolist() == [0, 2, 5]
    assert imported.notes[WITHIN] == 2


def test_idle_passes_have_nothing(tmp_path: Path) -> None:
    records = served(made_up_trace(), [1] * 3, [0] * 3)
    idle = {**record(made_up_trace(), [], 2), "forward_mode": 4, "input_ids": None}
    assert read(tmp_path / "x.pt", [idle, *records, idle]).trace.num_tokens == 8


GOOD = record(made_up_trace(), [(0, 0, 3)], 1)
IDS = GOOD["topk_ids_of_layer"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param(
            {"forward_mode": 5}, "forward_mode is 5, .*without speculative decoding", id="speculative"
        ),
        pytest.param({"extend_seq_lens": [2]}, r"extend_seq_lens is \[2\], .* whose sum is 3", id="lengths"),
        pytest.param({"extend_seq_lens": [0, 3]}, "expected numbers from 1", id="no tokens"),
        pytest.param({"extend_seq_lens": None}, "extend_seq_lens is not a list of numbers", id="no lengths"),
        pytest.param({"positions": [0, 1]}, "positions is not a list of 3 numbers", id="few positions"),
        pytest.param({"positions": [0, 2, 3]}, "positions do not follow one another", id="gap"),
        pytest.param({"input_ids": ["a"] * 3}, "input_ids is not a list of 3 numbers", id="text"),
        pytest.param({"topk_ids_of_layer": [1]}, "no tensor of integers with 3 dimensions", id="no tensor"),
        pytest.param({"topk_ids_of_layer": torch.zeros(4, 3, 8)}, "no tensor of integers", id="floats"),
        pytest.param(
            {"topk_ids_of_layer": torch.zeros(1, 1, 1, dtype=torch.int32).expand(4, 1 << 40, 8)},
            "no tensor of integers",
            id="larger than it is",
        ),
        pytest.param({"topk_ids_of_layer": torch.where(IDS < 0, IDS, IDS + 7)}, "expert id is", id="beyond"),
    ],
)
def test_an_odd_record_is_refused_with_its_number(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        read(tmp_path / "x.pt", [GOOD, {**GOOD, **changes}])
    assert "record 1" in refusal.value.message


def test_layers_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="3 layers and top-2, expected those of record 0: 4"):
        read(tmp_path / "x.pt", [GOOD, {**GOOD, "topk_ids_of_layer": IDS[:3]}])


@pytest.mark.parametrize(
    "mapped", [[[0, 1, 2, 3, 4, 5, 6, 7, 0]], [[1, 0, 2, 3, 4, 5, 6, 7]]], ids=["more", "moved"]
)
def test_physical_ids_are_refused(tmp_path: Path, mapped: list[list[int]]) -> None:
    with pytest.raises(TraceError, match=r"holds physical ids.*--enable-eplb"):
        read(tmp_path / "x.pt", [GOOD], last_physical_to_logical_map=torch.tensor(mapped))


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"rank": 0, "logical_count": torch.zeros(2)}, "no records of single tokens.*per_token"),
        ({"records": [{"global_physical_count": 3}]}, "record 0: no topk_ids_of_layer.*per_token"),
        ({"records": []}, "has no tokens"),
        ([1], "no records of single tokens"),
    ],
)
def test_what_another_mode_of_the_recorder_wrote_is_refused(
    tmp_path: Path, document: Any, reason: str
) -> None:
    if isinstance(document, dict):
        document["last_physical_to_logical_map"] = torch.arange(8).repeat(3, 1)
    torch.save(document, tmp_path / "x.pt")
    with pytest.raises(TraceError, match=reason):
        sglang_recorder.read(tmp_path / "x.pt", NAMED)


class Evil:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match="cannot be read as tensors and plain containers"):
        read(tmp_path / "x.pt", [GOOD], evil=Evil(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 20))
    with pytest.raises(TraceFormatError, match="claims 1048576 bytes"):
        sglang_recorder.read(tmp_path / "x.pt", NAMED)


@pytest.mark.parametrize("keep", [0, 100, -200])
def test_a_damaged_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "x.pt", [GOOD])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TraceFormatError, match=r"x\.pt"):
        sglang_recorder.read(path, NAMED)


def test_the_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match=r"does not name its model\. Name it: --model NAME"):
        sglang_recorder.read(write(tmp_path / "x.pt", [GOOD]), Told())
