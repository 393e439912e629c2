"""`specmoe bench --quick` as a person runs it, on the toy: everything runs, whatever it takes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specmoe.bench.model_time import ModelTime
from specmoe.bench.parts import QUICK
from specmoe.bench.report import markdown
from specmoe.cli import main
from speculation.runtime import Speculator
from tests.toy_version import toy_store, toy_stored


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def measured(store: Path) -> tuple[dict[str, Any], str]:
    """(the numbers, the tables) of one quick run."""
    out, tables = store.parent / "bench.json", store.parent / "bench.md"
    flags = ["--store", str(store), "--provider", "cpu", "--json", str(out), "--markdown", str(tables)]
    # Other servers take half a minute to start where they are installed: `test_servers.py` is without.
    flags += ["--only", "model", "rest", "stream", "memory"]
    assert main(["bench", "--quick", "--model", "toy@1", *flags]) == 0
    return json.loads(out.read_text()), tables.read_text()


def test_every_case_is_measured_beside_its_reference(measured: tuple[dict[str, Any], str]) -> None:
    report, _ = measured
    assert report["complete"]
    assert (report["model"], report["version"], report["provider"]) == ("toy", 1, "cpu")
    assert len(report["model_time"]) == 9
    assert all(row["speculator"]["calls"] == row["session"]["calls"] for row in report["model_time"])
    rest = {(row["transport"], row["connections"]): row for row in report["rest"]["rows"]}
    assert set(rest) == {("tcp", 1), ("tcp", 16), ("unix", 1), ("unix", 16)}
    for row in rest.values():
        assert min(row["service"]["calls"], row["bare"]["calls"]) >= row["connections"]


def test_a_version_that_reads_a_hidden_state_is_measured_without_one() -> None:
    stored = toy_stored(hidden_size=6)
    measuring = ModelTime(stored, Speculator(stored, provider="cpu"))
    assert len(list(measuring.run(replace(QUICK, model_seconds=0.001)))) == len(measuring.report()) == 9


def test_the_ratio_is_that_of_the_numbers_beside_it(measured: tuple[dict[str, Any], str]) -> None:
    rest = measured[0]["rest"]
    for row in rest["rows"]:
        alone = row["bare"]["p50_us"] + row["connections"] * rest["model"]["p50_us"]
        assert row["ratio"] == pytest.approx(row["service"]["p50_us"] / alone, rel=1e-2)


def test_the_hardware_is_named(measured: tuple[dict[str, Any], str]) -> None:
    machine = measured[0]["machine"]
    assert {"cpu", "cores", "python", "onnxruntime", "load_average_at_start"} <= set(machine)
    assert machine["cpu"] in measured[1]


def test_the_tables_are_markdown(measured: tuple[dict[str, Any], str]) -> None:
    report, text = measured
    assert text == markdown(report)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 9) + (2 + 4) + (2 + 7) + (2 + 7) + (2 + 1)
    assert {line.count("|") for line in tables} == {9, 11, 8, 5}


@pytest.mark.parametrize(("ratio", "word"), [(1.6, "met"), (1.61, "missed")])
def test_whether_the_aim_is_met_is_said(
    measured: tuple[dict[str, Any], str], ratio: float, word: str
) -> None:
    report = json.loads(json.dumps(measured[0]))
    for row in report["rest"]["rows"]:
        row["ratio"] = ratio
    assert markdown(report).count(f"| {word:>9} |") == 4


def test_every_case_of_the_stream_is_measured(measured: tuple[dict[str, Any], str]) -> None:
    stream = measured[0]["stream"]
    for row in stream["rows"]:
        assert row["start"]["calls"] >= row["connections"]
        assert row["start"]["calls"] + row["layer"]["calls"] == row["all"]["calls"]
    assert {row["sequences"] for row in stream["rows"]} == set(map(int, stream["steps"])) == {1, 32}


def test_what_is_added_is_the_difference_of_the_numbers_beside_it(
    measured: tuple[dict[str, Any], str],
) -> None:
    stream = measured[0]["stream"]
    for row in stream["rows"]:
        model = stream["steps"][str(row["sequences"])]["p50_us"]
        assert row["added_us"] == pytest.approx(row["all"]["p50_us"] - model, abs=0.02)


def test_memory_is_that_of_the_service_with_its_sequences(measured: tuple[dict[str, Any], str]) -> None:
    memory = measured[0]["memory"]
    assert memory["sequences"] == 100
    assert 0 < memory["before_mb"] <= memory["after_mb"] + 20


def test_half_of_it_can_be_measured(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--quick", "--only", "model", "--store", str(store), "--model", "toy"]) == 0
    printed = capsys.readouterr().out
    assert "## The model alone" in printed
    assert "## REST" not in printed


def test_ctrl_c_prints_what_there_is(store: Path) -> None:
    command = [sys.executable, "-m", "specmoe.cli", "bench", "--store", str(store), "--model", "toy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = ""
        while "batch 8" not in seen:
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted" in printed
    assert "predict, no layer seen" in printed


def test_a_model_that_is_not_there_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--store", str(store), "--model", "other"]) == 2
    assert "other" in capsys.readouterr().err
