"""Scores of a reference model on held-out text: loss by domain, the experts' use; and a unigram's loss.

`specmoe reference-moe report` calls it for the model as it is saved, in half precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from training.reference_moe.model import answer
from training.reference_moe.windows import Ids, in_order

BATCH = 8


@dataclass(frozen=True)
class Scores:
    """losses: of each domain, nats a token. counts: how often each expert was chosen, by domain.

    Without layers that choose among experts, `counts` has no layers.
    """

    losses: Mapping[str, float]
    counts: Int64[np.ndarray, "D L E"]

    @property
    def perplexity(self) -> float:
        """Of all domains alike."""
        return float(np.exp(np.mean(list(self.losses.values()))))


@torch.no_grad()
def score(model: Any, ids: Ids, context: int, tokens: int) -> Scores:
    """Score a model on windows in order, `tokens` of each domain at most."""
    losses, counts = {}, []
    for domain, of in ids.items():
        answers = [
            answer(model, windows.to(model.device)) for windows in in_order(of, context, tokens).split(BATCH)
        ]
        losses[domain] = float(torch.cat([told.losses.flatten() for told in answers]).mean())
        counts.append(sum(_counts(model, told.routers) for told in answers))
    return Scores(losses, np.stack(counts))


def _counts(model: Any, routers: tuple[Float[Tensor, "N E"], ...]) -> Int64[np.ndarray, "L E"]:
    experts = model.config.num_experts
    if experts == 1:
        return np.zeros((0, 1), np.int64)
    top_k = 1 if model.config.is_encoder_decoder else model.config.num_experts_per_tok
    chosen = (logits.topk(top_k).indices.flatten() for logits in routers)
    return np.stack([torch.bincount(of, minlength=experts).cpu().numpy() for of in chosen])


def unigram_losses(train: Ids, held_out: Ids, vocabulary: int, context: int, tokens: int) -> dict[str, float]:
    """Loss of the tokens' frequencies in training, all domains alike, on the same windows; nats a token."""
    counted = [np.bincount(of, minlength=vocabulary) + 1.0 for of in train.values()]
    frequency = np.mean([counts / counts.sum() for counts in counted], 0)
    return {
        domain: float(-np.log(frequency[in_order(of, context, tokens)[:, 1:].numpy()]).mean())
        for domain, of in held_out.items()
    }
