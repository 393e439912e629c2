"""The training loop: steps, looks at the validation split, checkpoints, early stopping.

Between `dataset` and `export`; `specmoe train` runs it.

    specmoe train --traces train.npz --validation validation.npz --run runs/mine
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training import checkpoint
from training.augmentation import draw_change
from training.config import TrainConfig
from training.errors import RunInvalid, TrainingError
from training.examples import Batch, Examples
from training.loss import loss_of, unseen, weighted, weighted_next
from training.optimizer import optimizer
from training.plan import Plan, plan_step, steps_per_pass
from training.precision import products
from training.predictors.predictor import Predictor
from training.processes import Processes
from training.vocabulary import UNKNOWN_ROW

CHECKPOINT = "checkpoint.pt"
# Longer gradients than this are shortened to it: rare tokens give rare bursts.
MAX_GRADIENT_NORM = 1.0
# Tokens of the validation split looked at together; bounds memory to some 100 MB.
VALIDATION_TOKENS = 512


@dataclass(frozen=True)
class Look:
    """How the averaged weights do on the validation split.

    loss: mean over unseen layers, nats per routed expert. recall_start, recall_next: recall@k of whole
    tokens before their first layer, and one layer ahead.
    """

    loss: float
    recall_start: float
    recall_next: float


class Trainer:
    """One training run, from its first step or from its checkpoint.

    validation: None where nothing is kept back: then the last weights are the best. passes: to stop after,
    None for all of the config's; step sizes are those of all, either way.
    folder: where checkpoint and TensorBoard events go. Raises RunInvalid where the checkpoint there is of
    another predictor.
    """

    def __init__(
        self,
        predictor: Predictor,
        train: Examples[Batch],
        validation: Examples[Batch] | None,
        config: TrainConfig,
        folder: Path,
        where: Processes,
        passes: int | None = None,
    ) -> None:
        self.train, self.validation, self.config, self.folder, self.where = (
            train,
            validation,
            config,
            folder,
            where,
        )
        self.predictor = predictor.to(where.device)
        self.average = AveragedModel(predictor, multi_avg_fn=averaging(config.averaging))
        self.optimizer = optimizer(predictor, config)
        self.total_steps = config.passes * steps_per_pass(train, config)
        self.last_step = (passes or config.passes) * steps_per_pass(train, config)
        self.step = 0
        self.best = math.inf
        self.looks_since_best = 0
        self.best_weights: dict[str, Tensor] = {}
        self.seconds = 0.0

    def fit(self) -> Predictor:
        """Train to the end, or until the validation loss stops falling. Returns the best averaged weights.

        Interrupted (Ctrl-C), it leaves a checkpoint and raises KeyboardInterrupt.
        """
        bar = tqdm(
            total=self.last_step, initial=self.step, unit="step", desc="train", disable=not self.where.leads
        )
        began = time.monotonic() - self.seconds
        look_every = self.config.evaluate_every * steps_per_pass(self.train, self.config)
        with bar, _events(self.folder, self.where, self.step) as events:
            try:
                while self.step < self.last_step and self.looks_since_best < self.config.patience:
                    loss = self.take_step()
                    bar.update()
                    self.seconds = time.monotonic() - began
                    events.add_scalar("train/loss", loss, self.step)
                    if self.step % look_every == 0 or self.step == self.last_step:
                        if self.validation is None:
                            if self.step == self.last_step:
                                self.best_weights = self._averaged()
                            bar.set_postfix_str(f"loss {loss:.3f}")
                        else:
                            look = self.look()
                            self._keep_best(look)
                            self._report(look, loss, bar, events)
                        self.save()
            except KeyboardInterrupt:
                self.save()
                raise
        self.predictor.load_state_dict(self.best_weights)
        return self.predictor

    def take_step(self) -> float:
        """One step. Returns its loss, the mean over all processes."""
        plan = plan_step(self.train, self.config, self.step)
        lengths = torch.from_numpy(self.train.length[plan.blocks])
        weight = self._total_weight(plan, lengths)
        torch.manual_seed(hash((self.config.seed, self.step, self.where.rank)) & 0xFFFFFFFF)
        rate = schedule(self.step, self.total_steps, self.config.warmup_steps, self.config.restarts)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
        self.predictor.train()
        self.predictor.zero_grad()
        part = plan.part(self.where.rank, self.where.world)
        loss = torch.zeros((), device=self.where.device)
        if len(part.blocks):
            loss = self._loss(part) / weight
            loss.backward()
        self.where.sum_gradients(self.predictor)
        nn.utils.clip_grad_norm_(self.predictor.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.average.update_parameters(self.predictor)
        self.step += 1
        total = float(self.where.sum(loss.detach()))
        if not math.isfinite(total):
            raise TrainingError(
                f"The loss became {total} at step {self.step}.",
                remedy="Lower --learning-rate or raise --warmup-steps.",
            )
        return total

    def _loss(self, plan: Plan) -> Float[Tensor, ""]:
        inside = self.train.inside(plan.blocks)
        hide_history, hide_token = (
            torch.from_numpy(hide[inside]) for hide in (plan.hide_history, plan.hide_token)
        )
        batch = self.train.draw(plan.blocks, plan.hide_gates).hiding(hide_history, hide_token)
        targets = batch.targets
        length = torch.from_numpy(self.train.length[plan.blocks])
        if change := draw_change(self.config, self.train.spec, length):
            batch, targets = batch.changed(change), change.targets(targets)
        ids, vocabulary = batch.token_ids.numpy(), self.predictor.vocabulary
        rows = vocabulary.rows_of_tokens(ids)
        rare, lone = plan.make_rare[inside], plan.hide_pair[inside]
        rows[rare, :-1] = vocabulary.shared_rows(ids[rare])
        rows[rare | lone, -1] = UNKNOWN_ROW
        seen = torch.from_numpy(plan.seen[inside])
        layers, near = self.train.spec.num_layers, self.config.near
        with self._precision():
            if not self._asks_all:
                weight = weighted(seen, layers, near)
                told = self._to_device(batch, targets, torch.from_numpy(rows), seen, weight)
                return self._summed_loss(self.predictor, *told)[0]
            next_weight = weighted_next(layers, near, self.config.prefixes).expand(len(rows), -1, -1)
            batch, targets, known, seen, weight, next_weight = self._to_device(
                batch, targets, torch.from_numpy(rows), seen, unseen(seen, layers), next_weight
            )
            logits, of_next = self.predictor.with_next(batch, known, seen)
            return self._loss_of(logits, targets, weight) + self._loss_of(of_next, targets, next_weight)

    @property
    def _asks_all(self) -> bool:
        """Whether the layers just ahead are asked about with every number of layers seen."""
        return self.config.near > 0 and self.predictor.has_next

    def _to_device(self, *told: Any) -> list[Any]:
        return [tensor.to(self.where.device) for tensor in told]

    def _precision(self) -> AbstractContextManager[Any]:
        return products(self.config.precision, self.where.device)

    def _summed_loss(
        self,
        predictor: nn.Module,
        batch: Batch,
        targets: Float[Tensor, "B L E"],
        rows: Int64[Tensor, "B R"],
        seen: Int64[Tensor, "B P"],
        weight: Float[Tensor, "B P L"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "*M B P L E"], Float[Tensor, "B L E"]]:
        """Loss, logits and targets. Of M answers, the loss is the mean."""
        logits = predictor(batch, rows, seen)
        loss = self._loss_of(logits, targets, weight)
        return loss * (targets.numel() * seen.shape[1] / logits.numel()), logits, targets

    def _loss_of(
        self,
        logits: Float[Tensor, "*M B P L E"],
        targets: Float[Tensor, "B L E"],
        weight: Float[Tensor, "B P L"],
    ) -> Tensor:
        return loss_of(self.train.spec)(logits.float(), targets, weight)

    def _total_weight(self, plan: Plan, lengths: Int64[Tensor, "N"]) -> float:
        """What all unseen layers of the step count together, over all processes."""
        layers, near = self.train.spec.num_layers, self.config.near
        inside = torch.arange(plan.seen.shape[1]) < lengths[:, None]
        seen = torch.from_numpy(plan.seen)[inside]
        if not self._asks_all:
            return float(weighted(seen, layers, near).sum())
        more = weighted_next(layers, near, self.config.prefixes).sum() * len(seen)
        return float(unseen(seen, layers).sum() + more)

    @torch.no_grad()
    def look(self) -> Look:
        """Score the averaged weights on the validation split, each process its share."""
        self.average.eval()
        spec = self.train.spec
        seen = torch.tensor([0, 1, spec.num_layers // 4, spec.num_layers // 2, 3 * spec.num_layers // 4])
        seen = seen.clamp(max=spec.num_layers - 1).unique()
        sums = torch.zeros(5, device=self.where.device)
        validation: Any = self.validation  # nobody asks where there is none
        for number, batch in enumerate(validation.in_order(VALIDATION_TOKENS)):
            if number % self.where.world != self.where.rank:
                continue
            rows = torch.from_numpy(self.predictor.vocabulary.rows_of_tokens(batch.token_ids.numpy()))
            prefixes = seen.expand(len(rows), -1)
            counted = unseen(prefixes, spec.num_layers)
            told = self._to_device(batch, batch.targets, rows, prefixes, counted)
            loss, logits, targets = self._summed_loss(self.average, *told)
            hits = targets[:, None].expand_as(logits).gather(-1, logits.topk(spec.top_k).indices).sum(-1)
            ahead = [hits[:, p, int(s)].sum() for p, s in enumerate(seen) if s > 0]
            weight = counted.sum()
            sums += torch.stack(
                [
                    loss,
                    weight.to(loss),
                    hits[:, 0].sum(),
                    torch.stack(ahead).sum() if ahead else loss.new_zeros(()),
                    loss.new_tensor(len(rows)),
                ]
            )
        loss_sum, weight_sum, start, ahead_sum, tokens = self.where.sum(sums).tolist()
        routed = tokens * spec.top_k
        return Look(
            loss_sum / weight_sum,
            start / (routed * spec.num_layers),
            ahead_sum / (routed * max(1, len(seen) - 1)),
        )

    def _keep_best(self, look: Look) -> None:
        if look.loss < self.best:
            self.best, self.looks_since_best = look.loss, 0
            self.best_weights = self._averaged()
        else:
            self.looks_since_best += 1

    def _averaged(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.average.module.state_dict().items()}

    def _report(self, look: Look, loss: float, bar: tqdm[Any], events: Any) -> None:
        bar.set_postfix_str(
            f"loss {loss:.3f}, validation {look.loss:.3f}, recall start {look.recall_start:.3f}"
            f" next {look.recall_next:.3f}"
        )
        for name, value in vars(look).items():
            events.add_scalar(f"validation/{name}", value, self.step)

    def save(self) -> None:
        """Write the checkpoint, where this process leads."""
        if self.where.leads:
            checkpoint.save(
                self.folder / CHECKPOINT,
                {
                    "predictor": self.predictor.state_dict(),
                    "average": self.average.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "best": self.best,
                    "looks_since_best": self.looks_since_best,
                    "best_weights": self.best_weights,
                    "seconds": self.seconds,
                },
            )

    def resume(self) -> None:
        """Go on from the checkpoint in the folder."""
        saved = checkpoint.load(self.folder / CHECKPOINT)
        try:
            self.predictor.load_state_dict(saved["predictor"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise RunInvalid(
                f"{self.folder / CHECKPOINT} is of another predictor: {str(error).splitlines()[0]}",
                remedy="Resume with the options the run was started with, or choose a new --run folder.",
            ) from error
        self.step, self.best = saved["step"], saved["best"]
        self.looks_since_best, self.best_weights = saved["looks_since_best"], saved["best_weights"]
        self.seconds = saved["seconds"]


def best_passes(folder: Path, in_pass: int, config: TrainConfig) -> int:
    """After how many passes of `in_pass` steps a finished run had its best look. Raises RunInvalid."""
    saved = checkpoint.load(folder / CHECKPOINT)
    looks = math.ceil(saved["step"] / (in_pass * config.evaluate_every))
    if saved["step"] < in_pass * config.passes and saved["looks_since_best"] < config.patience:
        raise RunInvalid(
            f"{folder} is at step {saved['step']} of {in_pass * config.passes}.",
            remedy="Finish it first: specmoe train --resume.",
        )
    return min((looks - int(saved["looks_since_best"])) * config.evaluate_every, config.passes)


def schedule(step: int, total: int, warmup: int, restarts: int = 0) -> float:
    """Share of the peak step size: a linear rise, then half a cosine down to 0, perhaps again and again.

    Warm restarts: Loshchilov and Hutter 2017, with parts of equal length.
    """
    part = total / (restarts + 1)
    within = step - part * min(int(step / part), restarts)
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * within / part))


def averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential average of weights that forgets its random start: the decay grows from 0.1 to `decay`."""

    @torch.no_grad()
    def update(averages: Any, weights: Any, averaged: Any) -> None:
        warm = min(decay, (1 + int(averaged)) / (10 + int(averaged)))
        torch._foreach_lerp_(averages, weights, 1 - warm)

    return update


def _events(folder: Path, where: Processes, step: int) -> Any:
    """TensorBoard events, written by the leading process alone."""
    if where.leads:
        return SummaryWriter(str(folder), purge_step=step)
    return _NoEvents()


class _NoEvents:
    def __enter__(self) -> _NoEvents:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Nothing: another process writes them."""
