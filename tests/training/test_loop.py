"""Training: it learns, resumes as if it had never stopped, and shares its work without changing it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.toy_hidden import with_hidden
from tests.training.toy_run import ALONE, PREDICTOR, TRAIN, VALIDATION, toy_trainer
from tests.training.toy_zoo import SMALL, untrained
from training import checkpoint
from training.config import PrefixConfig, TrainConfig
from training.errors import RunInvalid, TrainingError
from training.loop import CHECKPOINT, Trainer, averaging, schedule
from training.plan import plan_step
from training.predictor_configs import reads_hidden
from training.predictors import examples_of, kind_of
from training.vocabulary import Vocabulary

CONFIG = TrainConfig(passes=3, batch_tokens=32, block_tokens=8, warmup_steps=2, averaging=0.9)


def test_training_lowers_the_validation_loss(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, CONFIG)
    before = trainer.look().loss
    trainer.fit()
    assert trainer.best < before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_asked_with_every_prefix_it_learns_what_comes_next(tmp_path: Path, precision: str) -> None:
    config = replace(CONFIG, near=5.0, precision=precision)
    trainer = toy_trainer(tmp_path, config)
    before = trainer.look()
    trainer.fit()
    assert trainer.best < 0.98 * before.loss
    assert trainer.look().recall_next > before.recall_next + 0.02


@pytest.mark.parametrize("name", SMALL)
def test_every_predictor_learns_in_half_precision(tmp_path: Path, name: str) -> None:
    trace = with_hidden(TRAIN) if reads_hidden(SMALL[name]) else TRAIN
    network = untrained(SMALL[name], trace)
    blocks = examples_of(trace, CONFIG.block_tokens, SMALL[name])
    trainer = Trainer(network, blocks, blocks, replace(CONFIG, precision="bfloat16"), tmp_path, ALONE)
    before = trainer.look().loss
    trainer.fit()
    assert trainer.best < before


def test_the_next_layers_count_with_every_prefix_as_if_it_had_been_drawn(tmp_path: Path) -> None:
    layers = TRAIN.spec.num_layers
    config = TrainConfig(batch_tokens=32, block_tokens=8, prefixes=3)
    plan = plan_step(toy_trainer(tmp_path, config).train, config, 0)
    every = replace(plan, seen=np.broadcast_to(np.arange(layers), (*plan.seen.shape[:2], layers)).copy())

    def loss(near: float, *, has_next: bool) -> float:
        trainer = toy_trainer(tmp_path, replace(config, near=near))
        trainer.predictor.has_next = has_next
        trainer.predictor.eval()
        return float(trainer._loss(every).detach())

    more_if_drawn = loss(2.0, has_next=False) - loss(0.0, has_next=False)
    more_if_asked = loss(2.0, has_next=True) - loss(0.0, has_next=True)
    assert more_if_asked == pytest.approx(more_if_drawn * (config.prefixes - 1) / layers, rel=1e-4)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir(), (tmp_path / "halves").mkdir()
    whole = toy_trainer(tmp_path / "whole", CONFIG)
    whole.fit()
    first = toy_trainer(tmp_path / "halves", CONFIG)
    for _ in range(4):
        first.take_step()
    first.save()
    second = toy_trainer(tmp_path / "halves", CONFIG)
    second.resume()
    second.fit()
    assert second.best == pytest.approx(whole.best, abs=1e-6)


def test_an_interrupt_leaves_a_checkpoint(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, CONFIG)
    trainer.look = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == trainer.step > 0


def interrupted() -> None:
    raise KeyboardInterrupt


def test_a_loss_that_no_longer_falls_ends_the_run_early(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, TrainConfig(passes=50, batch_tokens=32, block_tokens=8, patience=1))
    trainer.best = 0.0  # nothing will be better
    trainer.best_weights = trainer.predictor.state_dict()
    trainer.fit()
    assert trainer.step < trainer.total_steps


def test_resuming_with_another_predictor_is_refused(tmp_path: Path) -> None:
    toy_trainer(tmp_path, CONFIG).save()
    wider = toy_trainer(tmp_path, CONFIG, PrefixConfig(width=24, hidden=32, blocks=1, decays=(0.0, 0.8)))
    with pytest.raises(RunInvalid, match="is of another predictor"):
        wider.resume()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(RunInvalid, match="is damaged"):
        toy_trainer(tmp_path, CONFIG).resume()


def test_a_loss_that_is_no_number_says_what_to_lower(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, CONFIG)
    with torch.no_grad():
        trainer.predictor.head.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="Lower --learning-rate"):
        trainer.take_step()


def test_step_sizes_rise_then_fall_to_zero() -> None:
    rates = [schedule(step, 100, 10) for step in range(101)]
    assert rates[0] < rates[5] < rates[9] and rates[9] > rates[50] > rates[99] > rates[100] == 0.0


def test_a_restart_begins_again_at_the_peak() -> None:
    rates = [schedule(step, 90, 1, restarts=2) for step in range(91)]
    assert rates[0] == rates[30] == rates[60] == 1.0 and rates[90] == 0.0
    assert max(rates[29], rates[59], rates[89]) < 0.01
    assert rates[:30] == pytest.approx(rates[30:60])


@pytest.mark.parametrize("name", ["interlayer", "multiscale"])
def test_large_steps_do_not_diverge(tmp_path: Path, name: str) -> None:
    config = TrainConfig(passes=8, batch_tokens=32, block_tokens=8, learning_rate=0.1, warmup_steps=1)
    torch.manual_seed(0)
    network = kind_of(SMALL[name]).network(
        TRAIN.spec, SMALL[name], Vocabulary.of(TRAIN.token_ids, TRAIN.starts)
    )
    train, validation = (examples_of(trace, 8, SMALL[name]) for trace in (TRAIN, VALIDATION))
    trainer = Trainer(network, train, validation, config, tmp_path, ALONE)
    losses = [trainer.take_step() for _ in range(trainer.total_steps)]
    assert max(losses[4:]) < 2 * losses[0] and sum(losses[-4:]) / 4 < losses[0]


def test_the_first_average_is_nearly_the_weights() -> None:
    average, weight = torch.zeros(1), torch.ones(1)
    averaging(0.999)([average], [weight], torch.tensor(0))
    assert average.item() == pytest.approx(0.9)


TWO_PROCESSES = """
import sys
from pathlib import Path
from tests.training.test_loop import EQUAL
from tests.training.toy_run import toy_trainer
from training.processes import processes
with processes() as where:
    trainer = toy_trainer(Path(sys.argv[1]), *EQUAL, where)
    losses = [trainer.take_step() for _ in range(6)] + [trainer.look().loss]
    if where.leads:
        print(" ".join(map(repr, losses)))
"""
# Dropout draws differ from process to process, so equality needs it off.
EQUAL = (replace(CONFIG, near=5.0), PrefixConfig(**{**vars(PREDICTOR), "dropout": 0.0, "input_dropout": 0.0}))


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = [float(loss) for loss in done.stdout.split()]
    alone = toy_trainer(tmp_path, *EQUAL)
    expected = [alone.take_step() for _ in range(6)] + [alone.look().loss]
    assert shared == pytest.approx(expected, abs=1e-5)
