"""Training the reference model: what it learns, resuming to the bit, what it leaves, what is refused."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from specmoe.cli import main
from tests.training.reference_moe.corpus import TINY, trained, write_split_corpus
from traces.files import load
from training.collection import model as collected
from training.errors import ConfigInvalid, RunInvalid, TextInvalid
from training.reference_moe import loop
from training.reference_moe.config import DEFAULTS, ReferenceConfig
from training.reference_moe.loop import Trainer, read_run
from training.reference_moe.model import answer, balance_loss, build, count_parameters
from training.reference_moe.report import report
from training.reference_moe.scores import score, unigram_losses
from training.reference_moe.texts import texts_of
from training.reference_moe.tokenizer import ids_of, train_tokenizer
from training.reference_moe.windows import draw, in_order

DECODER = TINY["decoder"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each shape."""
    folder = tmp_path_factory.mktemp("runs")
    for shape, config in TINY.items():
        trained(config, texts, folder / shape)
    return {shape: folder / shape for shape in TINY}


@pytest.mark.parametrize("shape", TINY)
def test_it_learns(runs: dict[str, Path], shape: str) -> None:
    run = read_run(runs[shape])
    assert run.step == 40
    assert run.log[-1]["validation"] < np.log(TINY[shape].vocabulary) - 0.5


def test_a_resumed_run_ends_with_the_same_bits(runs: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    half = trained(DECODER, texts, tmp_path / "run", minutes=1e-9)
    assert half.step == 0
    half.step = 0
    for _ in range(17):
        half.take_step()
    half.save()
    whole, resumed = read_run(runs["decoder"]), trained(DECODER, texts, tmp_path / "run", resume=True)
    assert resumed.step == whole.step
    for name, weight in whole.model.items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_ctrl_c_saves_a_whole_step(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Trainer.take_step

    def interrupted(self: Trainer) -> torch.Tensor:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return taken(self)

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(DECODER, texts, tmp_path / "run")
    assert read_run(tmp_path / "run").step == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("shape", TINY)
def test_what_it_leaves_is_a_model_of_transformers(runs: dict[str, Path], shape: str) -> None:
    loaded = collected.load(str(runs[shape]), device="cpu", dtype="float32")
    for name, weight in read_run(runs[shape]).model.items():
        assert torch.equal(loaded.model.state_dict()[name], weight.half().float()), name
    names = load_file(runs[shape] / "model.safetensors").keys()
    assert "lm_head.weight" not in names, "the embeddings are its weights, and written once"
    text = "def f(x): # Übung\n    return x"
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text


@pytest.mark.parametrize(("shape", "folders"), [("decoder", [""]), ("switch", ["encoder", "decoder"])])
def test_it_is_recorded_like_any_other_model(
    runs: dict[str, Path], texts: Path, tmp_path: Path, shape: str, folders: list[str]
) -> None:
    out = tmp_path / "traces"
    command = ["collect", str(runs[shape]), "--text", str(texts / "test" / "prose.txt"), "--out", str(out)]
    assert main([*command, "--length", "16"]) == 0
    for folder in folders:
        trace = load(out / folder)
        assert (trace.spec.num_experts, trace.spec.top_k) == (8, TINY[shape].top_k)
        assert trace.domains[0] == "prose"


def test_its_losses_are_those_that_transformers_tells(runs: dict[str, Path]) -> None:
    loaded = collected.load(str(runs["decoder"]), device="cpu", dtype="float32")
    window = torch.randint(1, 280, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = loaded.model(input_ids=window, labels=window, output_router_logits=False)
        told = answer(loaded.model, window)
    assert float(told.losses.mean()) == pytest.approx(float(output.loss), abs=1e-5)
    assert len(told.routers) == DECODER.layers


def test_a_switch_reads_no_target_before_it_tells_it(runs: dict[str, Path]) -> None:
    loaded = collected.load(str(runs["switch"]), device="cpu", dtype="float32")
    window = torch.randint(1, 280, (1, 17), generator=torch.Generator().manual_seed(0))
    other = window.clone()
    other[0, -1] = 1 + other[0, -1] % 279
    with torch.no_grad():
        logits, others = (answer(loaded.model, of).logits for of in (window, other))
    assert torch.equal(logits, others)


def test_the_balance_loss_is_one_where_experts_are_used_alike_and_more_where_not() -> None:
    alike = torch.eye(8).repeat(5, 1) * 4
    assert float(balance_loss((alike,), 1)) == pytest.approx(1)
    lopsided = torch.zeros(40, 8)
    lopsided[:, 3] = 4
    assert float(balance_loss((lopsided, alike), 1)) == pytest.approx(
        (8 * lopsided.softmax(-1)[0, 3] + 1) / 2
    )


def test_a_dense_model_costs_a_token_what_the_decoder_does() -> None:
    decoder, dense = (count_parameters(build(DEFAULTS[shape])) for shape in ("decoder", "dense"))
    assert dense[0] == dense[1]
    assert dense[1] == pytest.approx(decoder[1], rel=0.02)
    assert decoder[0] * 2 <= 30_000_000


def test_scores_are_those_of_every_window_alone(runs: dict[str, Path], texts: Path) -> None:
    loaded = collected.load(str(runs["decoder"]), device="cpu", dtype="float32")
    ids = {"prose": ids_of(loaded.tokenizer, texts_of(texts, "test")["prose"])}
    scores = score(loaded.model, ids, DECODER.context, 100_000)
    losses, windows = [], in_order(ids["prose"], DECODER.context, 100_000)
    for window in windows:
        with torch.no_grad():
            logits = loaded.model(input_ids=window[None, :-1]).logits[0]
        losses.append(float(functional.cross_entropy(logits, window[1:])))
    assert scores.losses["prose"] == pytest.approx(np.mean(losses), abs=1e-4)
    tokens = windows.numel() - len(windows)
    assert scores.counts.sum(-1).tolist() == [[tokens * DECODER.top_k] * DECODER.layers]


def test_a_unigram_knows_frequencies_alone() -> None:
    train = {"a": np.array([1] * 7 + [2], np.uint16), "b": np.array([3] * 8, np.uint16)}
    held_out = {"a": np.array([0, 1, 2], np.uint16)}
    frequency = np.mean([np.array([1, 8, 2, 1]) / 12, np.array([1, 1, 1, 9]) / 12], 0)
    losses = unigram_losses(train, held_out, 4, context=2, tokens=2)
    assert losses == {"a": pytest.approx(-np.log(frequency[[1, 2]]).mean())}


def test_a_step_draws_the_same_windows_again_and_all_domains_alike() -> None:
    ids = {"short": np.arange(20, dtype=np.uint16), "long": np.arange(100, 400, dtype=np.uint16)}
    first, again = draw(ids, DECODER, 3), draw(ids, DECODER, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, draw(ids, DECODER, 4))
    assert (first[:, 0] >= 100).sum() == DECODER.batch_size // 2
    assert torch.equal(first[:, 1:], first[:, :-1] + 1)


def test_a_long_text_is_tokenized_as_its_lines_are(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Eine Zeile, noch eine.\nUnd eine längere Zeile ohne Ende " * 9
    tokenizer = train_tokenizer({"a": text}, 300)
    monkeypatch.setattr("training.reference_moe.tokenizer.BLOCK_CHARACTERS", 70)
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids.tolist()) == text
    assert int(ids.max()) < len(tokenizer) <= 300


def test_the_report_tells_perplexity_and_the_experts_use(
    runs: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    told = report(list(runs.values()), texts, tmp_path / "report")
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (tmp_path / "report" / "report.md").read_text() == told
    assert (tmp_path / "report" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(document["models"]) == ["decoder", "dense", "switch"]
    decoder = document["models"]["decoder"]
    assert decoder["perplexity"] == pytest.approx(
        np.exp(np.log(list(decoder["perplexity_by_domain"].values())).mean())
    )
    assert len(decoder["experts"]["usage_entropy"]) == DECODER.layers
    assert document["models"]["dense"]["experts"] is None
    assert f"{decoder['perplexity']:.1f}" in told


def test_a_run_is_neither_overwritten_nor_resumed_otherwise(
    runs: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunInvalid, match="already holds a run"):
        trained(DECODER, texts, runs["decoder"])
    with pytest.raises(RunInvalid, match="was started otherwise: seed 0, now 1"):
        trained(replace(DECODER, seed=1), texts, runs["decoder"], resume=True)
    with pytest.raises(RunInvalid, match="holds no tokenizer"):
        trained(DECODER, texts, tmp_path / "none", resume=True)
    with pytest.raises(RunInvalid, match=r"holds no checkpoint\.pt"):
        report([tmp_path], texts, tmp_path / "report")


def test_a_checkpoint_of_another_kind_or_a_damaged_one_is_refused(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    torch.save({"predictor": {}, "step": 3}, tmp_path / loop.CHECKPOINT)
    with pytest.raises(RunInvalid, match="another kind of run"):
        read_run(tmp_path)
    (tmp_path / loop.CHECKPOINT).write_bytes((runs["decoder"] / loop.CHECKPOINT).read_bytes()[:500])
    with pytest.raises(RunInvalid, match="is damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "recurrent"}, "shape is recurrent, expected one of decoder, dense, switch"),
        ({"width": 100}, "width is 100, expected a multiple of 32"),
        ({"top_k": 33}, "top_k is 33, expected 1 to 32"),
        ({"vocabulary": 256}, "vocabulary is 256, expected 257 to 65536"),
        ({"context": 33}, "context is 33, expected an even number"),
        ({"tokens": 100}, "tokens is 100, expected 2048 at least"),
        ({"shape": "switch"}, "top_k is 4, expected 1 for a switch"),
        ({"precision": "int8"}, "precision is int8, expected one of float32, bfloat16"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_config_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        ReferenceConfig(**changes)


def test_too_little_text_and_a_device_that_is_not_there_are_told(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(TextInvalid, match=r"Domain \w+ has \d+ tokens in \w+, expected 4097 at least"):
        trained(replace(DECODER, context=4096, tokens=1 << 20), texts, tmp_path / "run")
    command = ["reference-moe", "train", "--texts", str(texts), "--run", str(tmp_path / "run")]
    assert main([*command, "--device", "nonsense"]) == 2
    assert main([*command, "--shape", "nonsense"]) == 2
    assert main([*command, "--minutes", "0"]) == 2
    assert not (tmp_path / "run").exists()


def test_the_commands_lead_from_texts_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.training.reference_moe.corpus import write_corpus

    texts, run, out = (str(tmp_path / name) for name in ("texts", "run", "report"))
    assert (
        main(["reference-moe", "texts", "--from", str(write_corpus(tmp_path / "own")), "--out", texts]) == 0
    )
    assert "prose: train" in capsys.readouterr().out
    small = ["--vocabulary", "280", "--width", "32", "--layers", "2", "--experts", "4", "--context", "16"]
    small += ["--tokens", "640", "--batch-size", "2", "--top-k", "2", "--expert-width", "8"]
    assert main(["reference-moe", "train", "--texts", texts, "--run", run, *small]) == 0
    assert main(["reference-moe", "report", run, "--texts", texts, "--out", out]) == 0
    assert "perplexity" in capsys.readouterr().out
