"""Muon for weight matrices, AdamW for the rest.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces the update of a
matrix by the nearest orthogonal one. It needs about half the passes of AdamW here. torch.optim.Muon
computes in bfloat16, which takes seconds a step on a CPU without it; this one computes in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from training.config import TrainConfig

# Quintic whose iteration drives singular values to about 1 (Jordan et al. 2024, 5 steps).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM = 0.95
# Scales an orthogonal update to the size of an AdamW one (Liu et al. 2025, "Muon is scalable for LLM
# training").
MATCH_ADAMW = 0.2


class Muon(torch.optim.Optimizer):
    """For parameters of two axes. lr: step size in AdamW's units; weight_decay: decoupled."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * MATCH_ADAMW * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """A matrix with the same singular vectors and singular values near 1, by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def optimizers(predictor: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One for the matrices of linear layers, one for embeddings, norms and biases."""
    matrices = [module.weight for module in predictor.modules() if isinstance(module, nn.Linear)]
    embeddings = [module.weight for module in predictor.modules() if isinstance(module, nn.Embedding)]
    grouped = {id(parameter) for parameter in matrices + embeddings}
    rest = [parameter for parameter in predictor.parameters() if id(parameter) not in grouped]
    return [
        Muon(matrices, config.matrix_learning_rate, config.matrix_weight_decay),
        torch.optim.AdamW(
            [
                {"params": embeddings, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
        ),
    ]
