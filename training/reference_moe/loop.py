"""The reference model's training: steps, looks at the validation texts, checkpoints; resumable to the bit.

    specmoe reference-moe train --texts runs/texts --run runs/reference

RUN/checkpoint.pt                      weights, optimizer, step, log: all that resuming needs
RUN/config.json, model.safetensors,
    tokenizer.json, ...                the model so far, as save_pretrained writes it, in half precision
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from training import checkpoint
from training.errors import RunInvalid, TrainingError
from training.loop import CHECKPOINT, MAX_GRADIENT_NORM, schedule
from training.precision import products
from training.reference_moe.config import ReferenceConfig
from training.reference_moe.model import answer, balance_loss, build
from training.reference_moe.windows import Ids, draw, in_order

# Steps between two looks at the validation texts, and two lines of the log.
LOOK_STEPS = 100
# Windows of each domain in a look: a second's work.
LOOK_WINDOWS = 4
SAVE_SECONDS = 180
ADAM_DECAYS = (0.9, 0.95)


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint holds. log: a line for every look. seconds: of training so far."""

    config: ReferenceConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    seconds: float
    log: list[dict[str, float]]


class Trainer:
    """One training of a reference model, from its first step or from its checkpoint.

    ids: token ids by domain, to train on and to look at. folder: where checkpoint and model go.

    Raises RunInvalid where the folder holds a run (resume False), or none, or another one (resume True).
    """

    def __init__(
        self,
        config: ReferenceConfig,
        tokenizer: PreTrainedTokenizerFast,
        train: Ids,
        validation: Ids,
        folder: Path,
        *,
        device: str = "cpu",
        resume: bool = False,
    ) -> None:
        self.config, self.tokenizer, self.train, self.folder = config, tokenizer, train, folder
        self.device = torch.device(device)
        self.model = build(config).to(self.device)
        self.optimizer = _optimizer(self.model, config)
        self.looked_at = torch.cat(
            [in_order(of, config.context, LOOK_WINDOWS * config.context) for of in validation.values()]
        )
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        if resume:
            self._resume()
        elif (folder / CHECKPOINT).exists():
            raise RunInvalid(
                f"{folder} already holds a run.", remedy="Give --resume to go on, or another --run folder."
            )
        folder.mkdir(parents=True, exist_ok=True)

    def fit(self, minutes: float = math.inf) -> None:
        """Train to the end, or for so many minutes; then, or where interrupted (Ctrl-C), save.

        Raises KeyboardInterrupt where interrupted, once the step is done.
        """
        began = time.monotonic() - self.seconds
        until, saved = time.monotonic() + minutes * 60, time.monotonic()
        steps, losses = self.config.steps, []
        bar = tqdm(total=steps, initial=self.step, unit="step", desc=self.config.shape)
        with bar, between_steps() as interrupted:
            while self.step < steps and time.monotonic() < until and not interrupted():
                losses.append(self.take_step())
                bar.update()
                self.seconds = time.monotonic() - began
                if self.step % LOOK_STEPS == 0 or self.step == steps:
                    self._note(torch.stack(losses).mean(0), bar)
                    losses = []
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self.save()
                        saved = time.monotonic()
            self.save()
            if interrupted():
                raise KeyboardInterrupt

    def take_step(self) -> Tensor:
        """One step. Returns its loss, nats a token, and how uneven the experts were used (1: not at all)."""
        window = draw(self.train, self.config, self.step).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * schedule(
                self.step, self.config.steps, self.config.warmup_steps
            )
        self.model.train()
        with self._precision():
            told = answer(self.model, window)
        loss, uneven = told.losses.mean(), balance_loss(told.routers, self.config.top_k)
        self.optimizer.zero_grad()
        (loss + self.config.balance * uneven).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.step += 1
        taken = float(loss.detach())
        if not math.isfinite(taken):
            raise TrainingError(
                f"The loss became {taken} at step {self.step}.",
                remedy="Lower --learning-rate or raise --warmup-steps.",
            )
        return torch.stack([loss.detach(), uneven.detach()]).cpu()

    def look(self) -> float:
        """The loss on the validation windows, nats a token."""
        return float(self._losses(self.looked_at).mean())

    @torch.no_grad()
    def _losses(self, windows: Int64[Tensor, "N T"]) -> Tensor:
        self.model.eval()
        with self._precision():
            parts = windows.to(self.device).split(self.config.batch_size)
            return torch.cat([answer(self.model, part).losses for part in parts])

    def _precision(self) -> Any:
        return products(self.config.precision, self.device)

    def _note(self, losses: Tensor, bar: Any) -> None:
        entry = {
            "step": self.step,
            "tokens": self.step * self.config.step_tokens,
            "seconds": round(self.seconds, 1),
            "loss": round(float(losses[0]), 4),
            "uneven": round(float(losses[1]), 4),
            "validation": round(self.look(), 4),
        }
        self.log.append(entry)
        bar.set_postfix_str(f"loss {entry['loss']:.3f}, validation {entry['validation']:.3f}")

    def save(self) -> None:
        """Write checkpoint and model; each file is replaced whole."""
        checkpoint.save(
            self.folder / CHECKPOINT,
            {
                "config": asdict(self.config),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "log": self.log,
            },
        )
        save_model(self.model, self.tokenizer, self.folder)

    def _resume(self) -> None:
        saved = read_run(self.folder)
        if saved.config != self.config:
            now = asdict(self.config)
            differing = [
                f"{name} {was}, now {now[name]}"
                for name, was in asdict(saved.config).items()
                if was != now[name]
            ]
            raise RunInvalid(
                f"{self.folder} was started otherwise: {'; '.join(differing)}.",
                remedy="Resume with the options it was started with, or choose another --run folder.",
            )
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        self.step, self.seconds, self.log = saved.step, saved.seconds, saved.log


def read_run(folder: Path) -> SavedRun:
    """The checkpoint in a run's folder. Raises RunInvalid where there is none, or another one."""
    remedy = "Give a folder made by `specmoe reference-moe train`."
    if not (folder / CHECKPOINT).is_file():
        raise RunInvalid(f"{folder} holds no {CHECKPOINT}.", remedy=remedy)
    saved = checkpoint.load(folder / CHECKPOINT)
    try:
        return SavedRun(**saved | {"config": ReferenceConfig(**saved["config"])})
    except (TypeError, KeyError) as error:
        raise RunInvalid(
            f"{folder / CHECKPOINT} is of another kind of run: {error}.",
            remedy=remedy,
        ) from error


@contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of a step, so that what is saved is whole. A second one does not wait."""
    came: list[int] = []

    def note(signal_number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(signal_number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def save_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model in half precision and its tokenizer so that `folder` always holds whole files."""
    writing = folder / "writing"
    shutil.rmtree(writing, ignore_errors=True)
    tied = model.all_tied_weights_keys
    half = {name: weight.half() for name, weight in model.state_dict().items() if name not in tied}
    model.save_pretrained(writing, state_dict=half)
    tokenizer.save_pretrained(writing)
    for file in sorted(writing.iterdir()):
        file.replace(folder / file.name)
    writing.rmdir()


def _optimizer(model: Any, config: ReferenceConfig) -> torch.optim.Optimizer:
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=ADAM_DECAYS)
