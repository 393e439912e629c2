"""`specmoe refit`: the same run again, on the validation traces, too, calibrated as the first one was."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_store.store import open_store
from specmoe.cli import main
from speculation.publishing import read_export
from speculation.runtime import Speculator
from tests.training.test_export import SMALL
from tests.training.toy_run import ALONE, TRAIN, VALIDATION, save_npz, toy_trainer
from training import checkpoint
from training.config import TrainConfig
from training.errors import RunInvalid
from training.evaluate import evaluate
from training.loop import CHECKPOINT, Trainer, best_passes
from training.run import read_run

assert VALIDATION.token_ids is not None
# Ids that no other trace has.
OTHERS = replace(VALIDATION, token_ids=VALIDATION.token_ids + 8)
IDS = VALIDATION.token_ids + 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces, a run, the same refitted, and a store, made by the command line."""
    folder = tmp_path_factory.mktemp("refit")
    train, validation = save_npz(TRAIN, folder / "t.npz"), save_npz(OTHERS, folder / "v.npz")
    traces = ["--traces", str(train), "--validation", str(validation)]
    assert main(["train", *traces, "--run", str(folder / "base"), *SMALL]) == 0
    assert main(again(folder, "final", "--publish", "--store", str(folder / "store"))) == 0
    return folder


def again(folder: Path, run: str, *words: str) -> list[str]:
    return [
        "refit",
        str(folder / "base"),
        "--traces",
        str(folder / "t.npz"),
        "--run",
        str(folder / run),
        *words,
    ]


def test_it_has_learnt_from_the_validation_traces(folder: Path) -> None:
    base, final = read_run(folder / "base"), read_run(folder / "final")
    assert not set(IDS.tolist()) & set(base.known_ids)
    assert set(final.known_ids) == set(base.known_ids) | set(IDS.tolist())
    steps = [checkpoint.load(folder / name / CHECKPOINT)["step"] for name in ("base", "final")]
    tokens = TRAIN.num_tokens, TRAIN.num_tokens + VALIDATION.num_tokens
    assert steps[1] / steps[0] == pytest.approx(tokens[1] / tokens[0], rel=0.2)


def test_it_is_calibrated_and_scored_as_the_run_before_it(folder: Path) -> None:
    before, after = (read_export(folder / name / "export") for name in ("base", "final"))
    assert after[0].metrics == before[0].metrics
    assert after[0].coverage == before[0].coverage
    assert after[0].golden != before[0].golden
    assert (before[0].lineage.refit, after[0].lineage.refit) == (False, True)
    assert after[0].lineage.traces == before[0].lineage.traces
    first, second = after[0].lineage.command.split(" && ")
    assert first == before[0].lineage.command and second.startswith("specmoe")


def test_it_is_published_and_better_on_what_it_has_learnt(folder: Path) -> None:
    after = Speculator(open_store(folder / "store").load("toy", 1), provider="cpu")
    before = Speculator(read_export(folder / "base" / "export")[1], provider="cpu")
    recall = [
        evaluate(speculator, OTHERS).metrics.distances()["start"]["recall_at_k"]
        for speculator in (before, after)
    ]
    assert recall[1] > recall[0]  # type: ignore[operator]


def test_interrupted_and_resumed_it_ends_as_if_it_had_not_been(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_step = Trainer.take_step

    def interrupted(trainer: Trainer) -> float:
        if trainer.step == trainer.last_step - 1:
            raise KeyboardInterrupt
        return take_step(trainer)

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    assert main(again(folder, "halves")) == 130
    monkeypatch.undo()
    assert main(["export", str(folder / "halves")]) == 2
    assert "was interrupted before its end. Go on with it: specmoe refit --resume" in capsys.readouterr().err
    assert main(again(folder, "halves", "--resume")) == 0
    weights = [checkpoint.load(folder / name / CHECKPOINT)["best_weights"] for name in ("final", "halves")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("base", "traces", "reason"),
    [
        ("base", "v.npz", "base was trained on t.npz, and v.npz came"),
        ("final", "t.npz", "final has learnt from its validation traces already. Give .*base"),
        ("nowhere", "t.npz", "nowhere holds no run"),
    ],
)
def test_it_says_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], base: str, traces: str, reason: str
) -> None:
    words = ["refit", str(folder / base), "--traces", str(folder / traces), "--run", str(folder / "new")]
    assert main(words) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (folder / "new").exists()


def test_where_to_publish_must_be_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(again(folder, "new", "--publish")) == 2
    assert "--publish has no --store" in capsys.readouterr().err


def test_it_takes_as_many_passes_as_were_best(tmp_path: Path) -> None:
    config = TrainConfig(passes=9, batch_tokens=32, block_tokens=8, evaluate_every=2, patience=2)
    trainer = toy_trainer(tmp_path, config)
    in_pass = trainer.total_steps // config.passes
    assert in_pass > 1
    for step, since_best, expected in ((8, 2, 4), (9, 0, 9), (9, 1, 8)):
        trainer.step, trainer.looks_since_best = step * in_pass, since_best
        trainer.save()
        assert best_passes(tmp_path, in_pass, config) == expected
    trainer.step, trainer.looks_since_best = 4 * in_pass, 1
    trainer.save()
    with pytest.raises(RunInvalid, match=rf"is at step {4 * in_pass} of {9 * in_pass}"):
        best_passes(tmp_path, in_pass, config)


def test_with_fewer_passes_step_sizes_stay_those_of_all(tmp_path: Path) -> None:
    config = TrainConfig(passes=4, batch_tokens=32, block_tokens=8)
    whole = toy_trainer(tmp_path, config)
    part = Trainer(whole.predictor, whole.train, None, config, tmp_path, ALONE, passes=3)
    assert (part.total_steps, part.last_step) == (whole.total_steps, whole.total_steps * 3 // 4)
    part.fit()
    assert part.step == part.last_step
    for name, value in part.average.module.state_dict().items():
        torch.testing.assert_close(part.best_weights[name], value)
