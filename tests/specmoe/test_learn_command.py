"""`specmoe learn`: from a saved model to a served predictor, interruptions, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from model_store.store import open_store
from specmoe import cli
from specmoe.learning import STATE
from tests.training.toy_models import saved
from traces.files import load

ROOT = Path(__file__).parents[2]
SMALL = ("--length", "48", "--passes", "1", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "sea.txt"
    path.write_text("".join(f"Wave {n} is wide, and land {n * 7 % 90} is far. " for n in range(90)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "Toy_OLMoE")


def given(model: Path, text: Path, folder: Path) -> list[str]:
    return ["learn", str(model), "--text", str(text), "--folder", str(folder), *SMALL]


def asked(url: str, question: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/v1/predict", json.dumps(question).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def test_one_command_leads_from_a_model_to_a_service_that_answers(
    model: Path, text: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "specmoe.cli", *given(model, text, tmp_path / "mine"), "--serve"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPECMOE_PORT": "0", "OMP_NUM_THREADS": "1"}
    errors = tmp_path / "said"
    with errors.open("w") as said:
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
    try:
        url = address_in(errors, running)
        answer = asked(url, {"model": "toy_olmoe", "sequences": [{"token_id": 88}], "top_n": 2})
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=60)
    assert answer["version"] == 1
    assert [layer["layer"] for layer in answer["predictions"][0]] == [0, 1, 2]
    assert all(len(set(layer["experts"])) == 2 for layer in answer["predictions"][0])


def address_in(errors: Path, running: subprocess.Popen[bytes]) -> str:
    """The address of the service once it is ready, from its log."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and running.poll() is None:
        for line in errors.read_text().splitlines():
            if '"listening"' in line:
                url = str(json.loads(line)["address"])
                with suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/readyz"):
                    return url
        time.sleep(0.1)
    raise AssertionError(errors.read_text())


def test_every_step_is_shown_and_leaves_what_it_made(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    assert cli.main([*given(model, text, mine), "--name", "Mine", "--alias", "candidate"]) == 0
    shown = capsys.readouterr()
    steps = [line.split()[2] for line in shown.err.splitlines() if line.startswith("specmoe: specmoe ")]
    assert steps == ["collect", "traces", "train", "evaluate"]
    assert shown.out.endswith(f"Next: specmoe serve --store {mine / 'store'}\n")
    assert open_store(str(mine / "store")).resolve("Mine", "candidate") == 1
    assert "nearest maps" in (mine / "report" / "report.md").read_text()
    parts = [load(mine / "parts" / name).num_tokens for name in ("train", "validation", "test")]
    assert sum(parts) == load(mine / "recorded").num_tokens and min(parts) > 0


def test_a_model_of_two_stacks_gets_a_predictor_for_each(text: Path, tmp_path: Path) -> None:
    switch, mine = saved(tmp_path / "Toy_Switch", "switch"), tmp_path / "mine"
    assert cli.main(given(switch, text, mine)) == 0
    assert set(open_store(str(mine / "store")).models()) == {"toy_switch-encoder", "toy_switch-decoder"}


class Interrupted:
    """`specmoe` commands of which one is interrupted at its very end, and one is not begun any more."""

    def __init__(self, at: str, before: str = "") -> None:
        self.at, self.before, self.main = at, before, cli.main
        self.ran: list[str] = []

    def __call__(self, words: list[str]) -> int:
        if words[0] == self.before:
            return 1
        self.ran.append(words[0])
        return self.main(words) or (130 if words[0] == self.at else 0)


@pytest.mark.parametrize("step", ["collect", "traces"])
def test_what_was_interrupted_goes_on_behind_what_is_done(
    model: Path, text: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, mine = cli.main, tmp_path / "mine"
    first, second = Interrupted(at=step), Interrupted(at="", before="train")
    monkeypatch.setattr(cli, "main", first)
    assert main(given(model, text, mine)) == 130
    monkeypatch.setattr(cli, "main", second)
    assert main([*given(model, text, mine), "--resume"]) == 1
    every = ["collect", "traces"]
    assert first.ran == every[: every.index(step) + 1] and second.ran == every[every.index(step) :]
    assert load(mine / "parts" / "test").num_tokens > 0


def test_training_goes_on_from_its_checkpoint_or_begins_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, mine = cli.main, tmp_path / "mine"
    again = Interrupted(at="train")
    monkeypatch.setattr(cli, "main", again)
    assert main(given(model, text, mine)) == 130
    assert main([*given(model, text, mine), "--resume"]) == 130
    (mine / "run" / "checkpoint.pt").unlink()
    monkeypatch.setattr(cli, "main", main)
    assert main([*given(model, text, mine), "--resume"]) == 0
    assert again.ran == ["collect", "traces", "train", "train"]
    assert open_store(str(mine / "store")).resolve("toy_olmoe", "production") == 3
    assert (mine / "report" / "report.md").exists()


def test_a_folder_with_something_in_it_is_left_alone(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for resume in ([], ["--resume"]):
        assert cli.main([*given(model, text, tmp_path), *resume]) == 2
        assert "is not an empty folder that specmoe learn began" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_other_options_are_refused_when_it_goes_on(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, mine = cli.main, tmp_path / "mine"
    monkeypatch.setattr(cli, "main", Interrupted(at="collect"))
    assert main(given(model, text, mine)) == 130
    capsys.readouterr()
    assert main([*given(model, text, mine), "--resume", "--tokens", "99"]) == 2
    assert f"{mine} was begun with other options: tokens was 'None', not '99'" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_mistake_before_anything_was_recorded_may_be_mended(
    model: Path,
    text: Path,
    tmp_path: Path,
    resume: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, mine = cli.main, tmp_path / "mine"
    assert main(given(model, tmp_path / "nowhere.txt", mine)) == 2
    assert "--resume goes on" not in capsys.readouterr().err
    monkeypatch.setattr(cli, "main", Interrupted(at="", before="traces"))
    assert main([*given(model, text, mine), *resume]) == 1
    assert load(mine / "recorded").num_tokens > 0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(["--passes", "0"], "passes is 0, expected"), (["--alias", "7"], "'7' cannot be an alias")],
)
def test_what_cannot_be_done_after_hours_is_refused_at_once(
    model: Path,
    text: Path,
    tmp_path: Path,
    wrong: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*given(model, text, tmp_path / "mine"), *wrong]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "mine").exists()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"options": 1}'])
def test_a_damaged_record_is_told(
    model: Path, text: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / STATE).write_text(content)
    assert cli.main([*given(model, text, tmp_path), "--resume"]) == 2
    assert f"{tmp_path / STATE} is not what specmoe learn wrote" in capsys.readouterr().err
