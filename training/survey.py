"""What a trained predictor says of every prefix of validation tokens: what calibration and coverage rest on.

trained predictor + validation split -> survey -> calibration tables, coverage tables -> export
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, localcontext

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int16
from torch import Tensor
from tqdm import tqdm

from model_store.manifest import Coverage
from training.calibration import Calibration, levelled
from training.examples import Batch, Examples
from training.predictors.predictor import Predictor

LEVELS = (0.9, 0.95, 0.99)
# The logits of a token at all its prefixes take L x L x E half-precision numbers, 37 kB for 24 x 32.
MAX_BYTES = 1 << 30
TOKENS_AT_ONCE = 64
# Attention over a window takes milliseconds a prefix: tens of thousands of tokens would take hours. With so
# many, the 99 % tables still rest on the twenty that need most.
MAX_WINDOWED_TOKENS = 2048


@dataclass(frozen=True)
class Survey:
    """Row s of a token is with its first s layers seen; entries of seen layers mean nothing.

    logits: of every expert, as calibration takes them. targets: whether it was routed.
    needed: how many first-ranked experts it takes to have all routed ones.
    """

    logits: Float16[np.ndarray, "N L L E"]
    targets: Bool[np.ndarray, "N L E"]
    needed: Int16[np.ndarray, "N L L"]


@torch.no_grad()
def survey(
    predictor: Predictor, blocks: Examples[Batch], *, token_ids: bool, progress: bool = False
) -> Survey:
    """Ask the predictor for every prefix of the tokens of `blocks`, with or without their ids.

    Where the logits of all would not fit into 1 GiB, or those who read windows would be asked about more than
    2,048 tokens, blocks evenly spread over the trace are asked.
    """
    predictor.eval()
    spec = blocks.spec
    chosen = _spread(blocks)
    seen = torch.arange(spec.num_layers)
    device = next(predictor.parameters()).device
    parts = []
    at_once = max(1, TOKENS_AT_ONCE // blocks.block_tokens)
    groups = range(0, len(chosen), at_once)
    for start in tqdm(groups, desc="survey", unit="batch", disable=not progress, leave=False):
        numbers = chosen[start : start + at_once]
        batch = blocks.draw(numbers, np.zeros(len(numbers), bool))
        if not token_ids:
            nobody = torch.zeros(len(batch.token_ids), dtype=torch.bool)
            batch = batch.hiding(history=nobody, ids=~nobody)
        rows = torch.from_numpy(predictor.vocabulary.rows_of_tokens(batch.token_ids.numpy()))
        prefixes = seen.expand(len(rows), -1).to(device)
        logits = levelled(predictor(batch.to(device), rows.to(device), prefixes), spec.top_k).cpu()
        targets = batch.targets.bool()
        parts.append((logits.half().numpy(), targets.numpy(), _needed(logits, targets, spec.top_k).numpy()))
    return Survey(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def coverage(found: Survey, calibration: Calibration, row: int) -> Coverage:
    """Which experts cover all routed ones with each level's probability, by layer and distance.

    Split conformal prediction (Vovk et al. 2005). A token's score is the calibrated probability of the routed
    expert that is least probable: whoever is at least as probable as the level's quantile of them is in the
    set, and the K first-ranked experts anyway. row: of the calibration tables, where that survey's begin.
    """
    num_layers, top_k = found.needed.shape[1], calibration.top_k
    thresholds = np.zeros((len(LEVELS), num_layers, num_layers))  # layers seen, target layer
    for seen in range(num_layers):
        logits = torch.from_numpy(found.logits[:, seen]).float()
        rows = torch.full((len(logits),), row + seen, dtype=torch.int32)
        probabilities = calibration.of_levelled(logits, rows).numpy()
        least = np.where(found.targets, probabilities, 2.0).min(axis=-1)  # N L
        least[found.needed[:, seen] <= top_k] = 1.0  # covered by the first-ranked alone
        for number, level in enumerate(LEVELS):
            thresholds[number, seen] = _quantile(least, level)
    # Distance d of layer l is with l + 1 - d layers seen.
    tables = tuple(
        tuple(tuple(map(_rounded_down, table[layer::-1, layer])) for layer in range(num_layers))
        for table in thresholds
    )
    first = tuple(tuple((top_k,) * (layer + 1) for layer in range(num_layers)) for _ in LEVELS)
    return Coverage(levels=LEVELS, experts=first, thresholds=tables)


def _quantile(scores: Float[np.ndarray, "N L"], level: float) -> Float[np.ndarray, "L"]:
    """What ceil((N + 1) level) of N scores reach, so that the level holds for a further token, too."""
    must = min(int(np.ceil((len(scores) + 1) * level)), len(scores))
    reached: Float[np.ndarray, "L"] = np.sort(scores, axis=0)[len(scores) - must]
    return reached


def _rounded_down(threshold: float) -> float:
    """To four digits; down, so that nobody falls out of a set for it."""
    with localcontext(prec=4, rounding=ROUND_FLOOR) as context:
        return float(context.create_decimal(float(threshold)))


def _spread(blocks: Examples[Batch]) -> np.ndarray:
    spec = blocks.spec
    token_bytes = spec.num_layers * spec.num_layers * spec.num_experts * 2
    tokens = MAX_BYTES // token_bytes
    if blocks.shares_prefix:
        tokens = min(tokens, MAX_WINDOWED_TOKENS)
    most = max(1, tokens // blocks.block_tokens)
    return np.unique(np.linspace(0, len(blocks) - 1, min(most, len(blocks))).astype(np.int64))


def _needed(logits: Tensor, targets: Tensor, top_k: int) -> Tensor:
    """Position of the worst-ranked routed expert, counted from 1; a tie counts against us."""
    worst = logits.masked_fill(~targets[:, None], torch.inf).amin(-1, keepdim=True)  # N L L 1
    return (logits >= worst).sum(-1).to(torch.int16)
