"""The `ensemble` predictor: three of different build, each trained on its own, answering as one.

Their logits are averaged: forecasts multiplied, each to the power of its weight (Hinton 2002, products of
experts, but trained apart). Weights follow from each member's loss on the validation split, at export:

    w = softmax(-loss / sharpness)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.augmentation import Change
from training.dataset import Batch, Blocks
from training.examples import Batch as AnyBatch
from training.examples import Examples
from training.loss import loss_of, unseen
from training.predictor_configs import EnsembleConfig
from training.predictors.interlayer import InterlayerPredictor
from training.predictors.multiscale import MultiscalePredictor
from training.predictors.predictor import Predictor
from training.predictors.prefix import PrefixPredictor
from training.vocabulary import Vocabulary
from training.windows import WindowBatch, Windows

# Tokens of the validation split weighed together.
TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class JointBatch:
    """The same tokens, as each member reads them."""

    prefix: Batch
    interlayer: WindowBatch
    multiscale: WindowBatch

    @property
    def targets(self) -> Float[Tensor, "B L E"]:
        """1 where routed."""
        return self.prefix.targets

    @property
    def token_ids(self) -> Int64[Tensor, "B R"]:
        """Ids of this token and of those before it, -1 where unknown or before the start."""
        return self.prefix.token_ids

    def to(self, device: torch.device) -> JointBatch:
        """The same on another device."""
        return self._each(lambda part: part.to(device))

    def hiding(self, history: Bool[Tensor, "B"], ids: Bool[Tensor, "B"]) -> JointBatch:
        """The same, some tokens without history, some without token ids."""
        return self._each(lambda part: part.hiding(history, ids))

    def changed(self, change: Change) -> JointBatch:
        """The same, augmented, but for the targets."""
        return self._each(lambda part: part.changed(change))

    def _each(self, change: Callable[[Any], Any]) -> JointBatch:
        return JointBatch(change(self.prefix), change(self.interlayer), change(self.multiscale))


class Joint(Examples[JointBatch]):
    """The blocks of a trace for all members."""

    shares_prefix = True

    def __init__(self, trace: RoutingTrace, block_tokens: int, config: EnsembleConfig) -> None:
        self.prefix = Blocks(trace, block_tokens, config.prefix)
        self.interlayer = Windows(trace, block_tokens, config.interlayer)
        self.multiscale = Windows(trace, block_tokens, config.multiscale)
        self.spec, self.block_tokens = trace.spec, block_tokens
        self.first, self.length = self.prefix.first, self.prefix.length

    def draw(self, blocks: Int64[np.ndarray, "N"], hide_gates: Bool[np.ndarray, "N"]) -> JointBatch:
        """The tokens of these blocks, one block after another; some as if no gates were known."""
        return JointBatch(
            self.prefix.draw(blocks, hide_gates),
            self.interlayer.draw(blocks, hide_gates),
            self.multiscale.draw(blocks, hide_gates),
        )


class EnsemblePredictor(Predictor):
    """members: by the name of their part of a batch. weights: what each counts, 1 together."""

    def __init__(self, spec: RoutingSpec, config: EnsembleConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.spec, self.config, self.vocabulary = spec, config, vocabulary
        self.members = nn.ModuleDict(
            {
                "prefix": PrefixPredictor(spec, config.prefix, vocabulary),
                "interlayer": InterlayerPredictor(spec, config.interlayer, vocabulary),
                "multiscale": MultiscalePredictor(spec, config.multiscale, vocabulary),
            }
        )
        self.reads_ids = bool(len(vocabulary.known))
        self.weights = nn.Buffer(torch.full((len(self.members),), 1 / len(self.members)))

    def forward(
        self, batch: JointBatch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "*M B P L E"]:
        """While training each member's logits, to be scored alone; else their weighted average."""
        each = self.each(batch, rows, seen)
        return each if self.training else self.together(each)

    def each(
        self, batch: JointBatch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "M B P L E"]:
        """Every member's logits."""
        return torch.stack(
            [member(getattr(batch, name), rows, seen) for name, member in self.members.items()]
        )

    def together(self, each: Float[Tensor, "M *B E"]) -> Float[Tensor, "*B E"]:
        """The average of members' logits, by their weights."""
        return (each * self.weights.view(-1, *[1] * (each.ndim - 1))).sum(0)

    @torch.no_grad()
    def settle(self, validation: Examples[AnyBatch]) -> None:
        """Weigh the members by their loss on the validation split."""
        self.eval()
        spec = self.spec
        loss = loss_of(spec)
        seen = torch.tensor([0, spec.num_layers // 2])
        losses, scored = torch.zeros(len(self.members)), 0.0
        for batch in validation.in_order(TOKENS_AT_ONCE):
            rows = torch.from_numpy(self.vocabulary.rows_of_tokens(batch.token_ids.numpy()))
            prefixes = seen.expand(len(rows), -1)
            weight = unseen(prefixes, spec.num_layers)
            each = self.each(batch, rows, prefixes)  # type: ignore[arg-type]
            losses += torch.stack([loss(logits, batch.targets, weight) for logits in each])
            scored += float(weight.sum())
        self.weights.copy_(torch.softmax(-losses / scored / self.config.sharpness, 0))

    def settle_as(self, other: Predictor) -> None:
        """The weights of another one."""
        self.weights.copy_(other.get_buffer("weights"))

    def settled(self) -> dict[str, Any]:
        """What each member counts, for the manifest."""
        shares = [round(share, 4) for share in self.weights.tolist()]
        return {"weights": dict(zip(self.members, shares, strict=True))}
