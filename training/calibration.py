"""Making confidence true: a scale and a bias for each distance, fitted on the validation split, in the graph.

Platt scaling (Platt 1999, "Probabilistic outputs for support vector machines"), one pair of numbers for each
distance to the target layer, for token start one for each layer, and all of it once with token ids and once
without, since a forecast knows less then: p = sigmoid(scale z + bias).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int32
from torch import Tensor, nn

# Newton's method on two numbers converges in a handful of steps; each is a pass over the logits.
NEWTON_STEPS = 10
TOLERANCE = 1e-4
# A pull towards scale 1, bias 0 that weighs as much as this many observations.
PRIOR = 20.0


class Calibration(nn.Module):
    """Tables of scale and bias by [token id known, number of layers seen, target layer]."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        shape = (2 * (num_layers + 1), num_layers)
        self.num_layers = num_layers
        self.scale = nn.Buffer(torch.ones(shape))
        self.bias = nn.Buffer(torch.zeros(shape))

    def forward(
        self, logits: Float[Tensor, "B L E"], seen: Int32[Tensor, "B"], token_known: Bool[Tensor, "B"]
    ) -> Float[Tensor, "B L E"]:
        row = seen + token_known.to(seen.dtype) * (self.num_layers + 1)
        scale = nn.functional.embedding(row, self.scale)[..., None]
        bias = nn.functional.embedding(row, self.bias)[..., None]
        return torch.sigmoid(logits * scale + bias)

    def set_tables(
        self, token_known: bool, scale: Float32[np.ndarray, "S L"], bias: Float32[np.ndarray, "S L"]
    ) -> None:
        """Take in what `fit` found for forecasts with, or without, a token id."""
        first = token_known * (self.num_layers + 1)
        self.scale[first : first + len(scale)] = torch.from_numpy(scale)
        self.bias[first : first + len(bias)] = torch.from_numpy(bias)


def fit(
    logits: Float16[np.ndarray, "N S L E"], targets: Bool[np.ndarray, "N L E"]
) -> tuple[Float32[np.ndarray, "S L"], Float32[np.ndarray, "S L"]]:
    """Scale and bias by [number of layers seen, target layer], from the logits of every prefix of N tokens.

    logits: row s of a token is with its first s layers seen, s = 0 .. L - 1, so S = L.
    """
    num_layers = logits.shape[1]
    scale, bias = np.ones((2, num_layers, num_layers), np.float32)
    bias[:] = 0
    for pairs in _buckets(num_layers):
        z = np.concatenate([logits[:, seen, layer].ravel() for seen, layer in pairs]).astype(np.float32)
        y = np.concatenate([targets[:, layer].ravel() for _, layer in pairs])
        fitted = platt(z, y)
        for seen, layer in pairs:
            scale[seen, layer], bias[seen, layer] = fitted
    return scale, bias


def _buckets(num_layers: int) -> list[list[tuple[int, int]]]:
    """The (layers seen, target layer) that share a pair: each layer at token start, then each distance."""
    start = [[(0, layer)] for layer in range(num_layers)]
    later = [
        [(target - distance + 1, target) for target in range(distance, num_layers)]
        for distance in range(1, num_layers)
    ]
    return start + later


def platt(z: Float32[np.ndarray, "N"], y: Bool[np.ndarray, "N"]) -> tuple[float, float]:
    """Scale and bias of the logits z that make y most likely, by Newton's method from (1, 0)."""
    theta = np.array([1.0, 0.0])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(theta[0] * z + theta[1])))
        error, weight = p - y, p * (1 - p)
        gradient = np.array([error @ z, error.sum()], np.float64) + PRIOR * (theta - (1.0, 0.0))
        mixed = weight @ z
        hessian = np.array([[weight @ (z * z), mixed], [mixed, weight.sum()]], np.float64)
        step = np.linalg.solve(hessian + PRIOR * np.eye(2), gradient)
        theta -= step
        if np.abs(step).max() < TOLERANCE:
            break
    return float(theta[0]), float(theta[1])
