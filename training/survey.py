"""What a trained predictor says of every prefix of validation tokens: what calibration and coverage rest on.

trained predictor + validation split -> survey -> calibration tables, coverage tables -> export
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int16, Int64
from torch import Tensor
from tqdm import tqdm

from model_store.manifest import Coverage
from training.calibration import levelled
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


def coverage(found: Survey) -> Coverage:
    """How many experts cover all routed ones with each level's probability, by layer and distance.

    Split conformal prediction (Vovk et al. 2005) over the layers at a distance, and over those of a token's
    start: see `_sizes`.
    """
    num_layers = found.needed.shape[1]
    sizes = [np.zeros((num_layers, num_layers), int) for _ in LEVELS]  # layers seen, target layer
    for cells in _alike(num_layers):
        for table, level in zip(sizes, LEVELS, strict=True):
            table[cells] = _sizes(found.needed[:, *cells], level)
    # Distance d of layer l is with l + 1 - d layers seen.
    tables = tuple(
        tuple(tuple(int(n) for n in table[layer::-1, layer]) for layer in range(num_layers))
        for table in sizes
    )
    return Coverage(levels=LEVELS, experts=tables)


def _alike(num_layers: int) -> Iterator[tuple[Int64[np.ndarray, "C"], Int64[np.ndarray, "C"]]]:
    """(layers seen, target layer) of those that are covered together: a token's start, each distance."""
    yield np.zeros(num_layers, int), np.arange(num_layers)
    for distance in range(1, num_layers):
        seen = np.arange(1, num_layers + 1 - distance)
        yield seen, seen + distance - 1


def _sizes(needed: Int16[np.ndarray, "N C"], level: float) -> list[int]:
    """A size for each of C layers, so that the layers together are covered with the level's probability.

    Of N tokens, ceil((N + 1) level) must be covered, so that the level holds for a further token of the same
    kind. Whole numbers of experts overshoot, at 90 % by two points in one layer: where the layers before
    have covered that many tokens more than they must, a layer gets one expert fewer.
    """
    chosen, ahead = [], 0
    for layer in needed.T:
        ordered = np.sort(layer)
        must = min(int(np.ceil((len(layer) + 1) * level)), len(layer))
        size = int(ordered[must - 1])
        fewer = int(np.searchsorted(ordered, size - 1, side="right"))
        if ahead + fewer >= must:
            size -= 1
        ahead += int(np.searchsorted(ordered, size, side="right")) - must
        chosen.append(size)
    return chosen


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
