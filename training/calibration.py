"""Making confidence true: four numbers for each distance, fitted on the validation split, in the graph.

Platt scaling (Platt 1999) in three pieces: logits are stretched by `below` where they are under -KNOT, by
`between` up to KNOT, and by `above` from there on, and shifted by `bias`. With m = min(max(z, -KNOT), KNOT):

    p = sigmoid(bias + between m + below min(z - m, 0) + above max(z - m, 0))

Most experts are far from being routed, and would decide a single slope. Two that meet at 0 leave an expected
calibration error four to five times as large as these three (gpt-oss-20b, the split they are fitted on:
0.006 to 0.011). Fitted for each distance to the target layer, for token start for each layer, and all of it
once with token ids and once without, since a forecast knows less then; likewise with hidden states and
without, where a predictor reads them.

A router that picks one expert makes the logits of a layer a distribution, whose level means nothing. What
is calibrated then are the log odds of their softmax, z = log p - log (1 - p).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int32
from torch import Tensor, nn

# Where one slope ends and the next begins: a probability of 0.12, and one of 0.88.
KNOT = 2.0
# Newton's method on four numbers converges in a handful of steps; each is a pass over the logits.
NEWTON_STEPS = 12
TOLERANCE = 1e-4
# A pull towards leaving logits as they are that weighs as much as this many observations.
PRIOR = 20.0
IDENTITY = (1.0, 1.0, 1.0, 0.0)
# Odds end there: a single float of a probability nearer to 1 knows no more.
SUREST = 1 - 1e-6
# A slope below it would turn the ranking over, or nearly so.
MIN_SLOPE = 0.05


class Calibration(nn.Module):
    """Tables of (below, between, above, bias) by [hidden state told,] [id known, layers seen, target layer].

    top_k: experts a layer routes a token to; with 1, logits are those of a softmax. hidden: whether there are
    tables for forecasts that know a hidden state, behind the others.
    """

    def __init__(self, num_layers: int, top_k: int, *, hidden: bool = False) -> None:
        super().__init__()
        self.num_layers, self.top_k = num_layers, top_k
        rows = 2 * (1 + hidden) * (num_layers + 1)
        self.below, self.between, self.above, self.bias = (
            nn.Buffer(torch.full((rows, num_layers), value)) for value in IDENTITY
        )

    def first_row(self, token_known: Bool[Tensor, "B"]) -> Int32[Tensor, "B"]:
        """Where the tables of a token begin, with or without an id."""
        return token_known.int() * (self.num_layers + 1)

    def first_row_told(self, hidden_told: Bool[Tensor, "B"]) -> Int32[Tensor, "B"]:
        """How much further down the tables are where a hidden state is told."""
        return hidden_told.int() * (2 * (self.num_layers + 1))

    def first_row_of(self, token_known: bool, *, hidden_told: bool) -> int:
        """Where the tables begin, with or without an id and a hidden state."""
        return (token_known + 2 * hidden_told) * (self.num_layers + 1)

    def forward(self, logits: Float[Tensor, "B L E"], row: Int32[Tensor, "B"]) -> Float[Tensor, "B L E"]:
        """Probabilities. row: `first_row` plus the number of layers seen, and `first_row_told`."""
        return self.of_levelled(levelled(logits, self.top_k), row)

    def of_levelled(self, logits: Float[Tensor, "B L E"], row: Int32[Tensor, "B"]) -> Float[Tensor, "B L E"]:
        """The same, from logits each of which is that of a probability (`levelled`)."""
        tables = self.below, self.between, self.above - self.below, self.bias
        return torch.sigmoid(stretched(logits, *(table[..., None].index_select(0, row) for table in tables)))

    def set_tables(
        self, token_known: bool, fitted: Float32[np.ndarray, "S 4 L"], *, hidden_told: bool = False
    ) -> None:
        """Take in what `fit` found for forecasts with, or without, a token id and a hidden state."""
        first = self.first_row_of(token_known, hidden_told=hidden_told)
        for number, table in enumerate((self.below, self.between, self.above, self.bias)):
            table[first : first + len(fitted)] = torch.from_numpy(fitted[:, number])


def stretched(z: Tensor, below: Tensor, between: Tensor, more: Tensor, bias: Tensor) -> Tensor:
    """Logits of calibrated probabilities. more: by how much the slope above is steeper than the one below."""
    inside = z.clamp(-KNOT, KNOT)
    outside = z - inside
    return bias + between * inside + below * outside + more * nn.functional.relu(outside)


def levelled(logits: Float[Tensor, "*B E"], top_k: int) -> Float[Tensor, "*B E"]:
    """Logits each of which is that of a probability."""
    return log_odds(logits) if top_k == 1 else logits


def log_odds(logits: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
    """Of each expert against all others, when one of them is routed by the softmax of the logits."""
    log_p = nn.functional.log_softmax(logits, -1)
    return log_p - torch.log(1 - log_p.exp().clamp(max=SUREST))


def fit(
    logits: Float16[np.ndarray, "N S L E"], targets: Bool[np.ndarray, "N L E"]
) -> Float32[np.ndarray, "S 4 L"]:
    """(below, between, above, bias) by number of layers seen and target layer, from the logits of N tokens.

    logits: row s of a token is with its first s layers seen, s = 0 .. L - 1, so S = L.
    """
    num_layers = logits.shape[1]
    tables = np.tile(np.array(IDENTITY, np.float32)[:, None], (num_layers, 1, num_layers))
    for pairs in _buckets(num_layers):
        z = np.concatenate([logits[:, seen, layer].ravel() for seen, layer in pairs]).astype(np.float32)
        y = np.concatenate([targets[:, layer].ravel() for _, layer in pairs])
        fitted = three_slopes(z, y)
        for seen, layer in pairs:
            tables[seen, :, layer] = fitted
    return tables


def _buckets(num_layers: int) -> list[list[tuple[int, int]]]:
    """The (layers seen, target layer) that share a pair: each layer at token start, then each distance."""
    start = [[(0, layer)] for layer in range(num_layers)]
    later = [
        [(target - distance + 1, target) for target in range(distance, num_layers)]
        for distance in range(1, num_layers)
    ]
    return start + later


def three_slopes(z: Float32[np.ndarray, "N"], y: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "4"]:
    """(below, between, above, bias) that make the outcomes y of the logits z most likely: Newton's method."""
    inside = np.clip(z, -KNOT, KNOT)
    outside = z - inside
    features = np.stack([np.minimum(outside, 0), inside, np.maximum(outside, 0), np.ones_like(z)])  # 4 N
    theta, prior = np.array(IDENTITY), PRIOR * np.eye(4)
    for _ in range(NEWTON_STEPS):
        p = (1 + np.tanh(theta.astype(np.float32) @ features / 2)) / 2  # as the sigmoid, and never overflows
        gradient = features @ (p - y) + prior @ (theta - IDENTITY)
        hessian = (features * (p * (1 - p))) @ features.T + prior
        step = np.linalg.solve(hessian.astype(np.float64), gradient.astype(np.float64))
        theta = theta - step
        theta[:3] = np.maximum(theta[:3], MIN_SLOPE)
        if np.abs(step).max() < TOLERANCE:
            break
    return theta
