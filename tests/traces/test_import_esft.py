"""Expert logs of ESFT: a file for each layer, a line for each text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specmoe.cli import main
from tests.traces.made_up import FIXTURES, bare, made_up_trace, same, traces
from traces.errors import TraceError, TraceFormatError
from traces.files import load
from traces.importers import esft
from traces.importers.told import Told
from traces.trace import RoutingTrace, concatenate

TOLD = Told("toy", num_experts=8, top_k=2)


def write(folder: Path, trace: RoutingTrace, first_layer: int = 1) -> Path:
    assert trace.gates is not None
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for layer in range(trace.spec.num_layers):
        with (folder / f"expert_weights_{layer + first_layer}.txt").open("w") as file:
            for index in range(trace.num_sequences):
                tokens = trace.sequence(index)
                experts = "\t".join(str(int(expert)) for expert in trace.experts[tokens, layer].flat)
                weights = "\t".join(str(float(gate)) for gate in trace.gates[tokens, layer].flat)
                file.write(f"{experts}\t\t{weights}\n")
    return folder


def test_the_fixture_is_what_its_lines_say() -> None:
    trace = esft.read(FIXTURES / "esft", Told("toy", num_experts=4, top_k=2)).trace
    assert trace.experts.tolist() == [[[3, 1], [2, 0]], [[1, 2], [0, 3]], [[2, 3], [1, 0]]]
    assert trace.gates is not None
    assert trace.gates[1].tolist() == [[0.5, 0.125], [0.875, 0.125]]
    assert trace.starts.tolist() == [0, 2, 3]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(traces(), st.integers(0, 98))
def test_what_was_routed_comes_back(tmp_path: Path, trace: RoutingTrace, first_layer: int) -> None:
    """Layers 98 to 101 would be out of order by name."""
    trace = made_up_trace(trace.spec, np.diff(trace.starts).tolist())
    told = Told("toy", num_experts=trace.spec.num_experts, top_k=trace.spec.top_k)
    imported = esft.read(write(tmp_path / "x", trace, first_layer), told)
    assert same(imported.trace, bare(trace, gates=True))


def test_folders_of_ranks_are_one_trace(tmp_path: Path) -> None:
    parts = [made_up_trace(seed=seed) for seed in range(2)]
    for rank, part in enumerate(parts):
        write(tmp_path / "in" / f"rank_{rank}", part)
    (tmp_path / "in" / "summary.json").write_text("{}")
    options = ["--model", "toy", "--num-experts", "8", "--top-k", "2"]
    assert main(["traces", "import", str(tmp_path / "in"), "--out", str(tmp_path / "t"), *options]) == 0
    assert same(load(tmp_path / "t"), bare(concatenate(parts), gates=True))


def test_a_folder_without_logs_is_refused_where_the_format_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    command = ["traces", "import", str(tmp_path / "in"), "--out", str(tmp_path / "t"), "--format", "esft"]
    assert main(command) == 2
    assert "is no folder with expert_weights_N.txt in it" in capsys.readouterr().err


def first_line(change: Callable[[str], str]) -> Callable[[list[str]], list[str]]:
    return lambda lines: [change(lines[0]), *lines[1:]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (first_line(lambda line: "x" + line), "txt, line 1: found .*expected numbers with tabs"),
        (first_line(lambda line: line.replace("\t\t", "\t")), "line 1: found .*two tabs before"),
        (first_line(lambda line: "\n"), "line 1: found"),
        (first_line(lambda line: "9" * 30 + line), "line 1: found"),
        (first_line(lambda line: "é" + line), "line 1: found"),
        (first_line(lambda line: "1\t" + line), "line 1: 9 experts and 8 weights, expected as many of both"),
        (first_line(lambda line: line.rstrip() + "\t0.5\n"), "line 1: 8 experts and 9 weights"),
        (first_line(lambda line: "1\t2\t\t0.5\t0.5\n"), "txt, line 1: 1 tokens, but .*1.txt has 4 there"),
        (first_line(lambda line: "8" + line[1:]), "line 1: token 0, layer 2: expert id is 8.*logical ids"),
        (first_line(lambda line: line.replace("\t\t0.", "\t\t-0.")), "token 0, layer 1: gate is -0"),
        (first_line(lambda line: line.replace("\t\t0.", "\t\t1e300\t0.", 1)), "8 experts and 9 weights"),
        (
            first_line(lambda line: line.split("\t\t")[0] + "\t\t" + "\t".join(["1e300"] * 8) + "\n"),
            "gate is inf",
        ),
        (lambda lines: lines[:-1], "expert_weights_2.txt has 2 lines, but .*expert_weights_1.txt 3"),
    ],
)
def test_an_odd_file_is_refused_with_its_line(
    tmp_path: Path, change: Callable[[list[str]], list[str]], reason: str
) -> None:
    file = write(tmp_path / "x", made_up_trace()) / "expert_weights_2.txt"
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))), encoding="utf-8")
    with pytest.raises(TraceError, match=reason):
        esft.read(tmp_path / "x", TOLD)


def test_experts_that_do_not_make_whole_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"line 1: 8 experts .* 3 for each token.*--top-k"):
        esft.read(write(tmp_path / "x", made_up_trace()), Told("toy", 8, None, 3))


def test_empty_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", made_up_trace())
    for file in (tmp_path / "x").iterdir():
        file.write_text("")
    with pytest.raises(TraceError, match="has no lines in its files"):
        esft.read(tmp_path / "x", TOLD)


def test_a_folder_beyond_the_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(esft, "MAX_BYTES", 100)
    with pytest.raises(TraceFormatError, match="100 at most are read"):
        esft.read(write(tmp_path / "x", made_up_trace()), TOLD)


@pytest.mark.parametrize(
    ("told", "option"),
    [
        (Told("toy", None, None, 2), "--num-experts"),
        (Told("toy", 8), "--top-k"),
        (Told(None, 8, None, 2), "--model"),
    ],
)
def test_what_the_files_do_not_say_must_be_told(tmp_path: Path, told: Told, option: str) -> None:
    with pytest.raises(TraceFormatError, match=option):
        esft.read(write(tmp_path / "x", made_up_trace()), told)
