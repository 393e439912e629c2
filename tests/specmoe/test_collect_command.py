"""`specmoe collect`: from a saved model to traces, Ctrl-C and going on, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specmoe import cli
from tests.training.toy_models import saved, tokenizer
from traces.files import load
from traces.recording import sequences_in


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "Toy_OLMoE")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sea.txt"
    path.write_text("The sea is wide, and the land is far away. " * 60, encoding="utf-8")
    return path


def test_what_is_collected_can_be_looked_at(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t"
    given = [str(model), "--text", str(text), "--out", str(out), "--length", "64", "--domain", "toys"]
    assert cli.main(["collect", *given, "--device", "cpu", "--dtype", "float32", "--name", "Toy"]) == 0
    shown = capsys.readouterr().out
    assert f"{out}: 2,580 tokens of 41 sequences, 3 layers x 8 experts, top-2, of Toy." in shown
    assert cli.main(["traces", "info", str(out), "--json", str(tmp_path / "info.json")]) == 0
    assert "0 of the tokens were decoded" in capsys.readouterr().out
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["domains"] == {"toys": {"sequences": 41, "tokens": 2580}}


def test_pieces_are_as_long_as_the_model_can_read(tmp_path: Path, text: Path) -> None:
    model = saved(tmp_path / "Short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    for generated, longest in (("0", 40), ("8", 39)):
        out = tmp_path / generated
        given = [str(model), "--text", str(text), "--out", str(out), "--tokens", "100"]
        assert cli.main(["collect", *given, "--generate", generated]) == 0
        assert max(load(out).starts[1:] - load(out).starts[:-1]) == longest


def test_ctrl_c_leaves_whole_shards_and_resuming_finishes_them(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t"
    text.write_text(text.read_text() * 40, encoding="utf-8")
    options = ["--text", str(text), "--out", str(out), "--length", "128"]
    command = [sys.executable, "-m", "specmoe.cli", "collect", str(model), *options]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    being_written = out / ".part-000000.parquet.tmp"
    while not (being_written.exists() and being_written.stat().st_size > 1000) and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said.splitlines()[-1]) == (130, "specmoe: interrupted.")
    done = sequences_in(out)
    assert 0 < done < len(text.read_text()) // 128
    budget = str((done + 3) * 128)
    assert cli.main(["collect", str(model), *options, "--resume", "--tokens", budget]) == 0
    assert load(out).num_sequences == done + 3


def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer().save_pretrained(tmp_path / "empty")
    given = [str(tmp_path / "empty"), "--text", str(text), "--out", str(tmp_path / "t")]
    assert cli.main(["collect", *given]) == 2
    assert "empty cannot be loaded: " in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(
    model: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(model), "--text", str(text), "--out", str(tmp_path / "t"), "--device", "cuda:77"]
    assert cli.main(["collect", *given]) == 2
    assert "does not fit onto device 'cuda:77'" in capsys.readouterr().err


def test_an_occupied_folder_is_refused_before_the_model_is_loaded(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path / "no model"), "--text", str(text), "--out", str(tmp_path)]
    assert cli.main(["collect", *given]) == 2
    assert "exists already" in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None\n"
    code += "from specmoe.cli import main; sys.exit(main(['collect', 'm', '--text', 'x', '--out', 'never']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install '.[collect]'" in done.stderr
