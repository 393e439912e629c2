"""The outlook: from a sequence's state, how probable a use of each expert is within the next n tokens.

a version's state -> maps and context -> Outlook -> `training.onnx_graph` -> outlook.onnx

    z[l, e] = b[l, e] + sum_q w[q, l] map_q[l, e] + sum_s v[s, l] log(map_s[l, e] + LITTLE)
                      + (U V context)[l, e]
    uses = sigmoid(bias_l + below_l min(z, 0) + above_l max(z, 0))

A map is any tensor of the state with a number for each expert of each layer, such as an average over past
routing; the logarithm is of those that are averages. The context is whatever vectors it has. So it fits every
predictor that keeps such a state, and reads nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from model_store.manifest import StateTensor
from traces.spec import RoutingSpec
from training.calibration import IDENTITY, stretched
from training.errors import ExportFailed

# Averages below it count as none: log of a share that a single use long ago left behind says nothing.
LITTLE = 0.02
FLOATS = ("float16", "float32")
# What a map counts before anything is learnt.
COPY = 0.3
LARGEST_BYTE = 255


class Outlook(nn.Module):
    """carried: the state tensors it reads, as `readable` picks them. rank: of the way from context."""

    def __init__(self, spec: RoutingSpec, carried: Sequence[StateTensor], rank: int) -> None:
        super().__init__()
        self.spec, self.carried = spec, tuple(carried)
        layers, experts = spec.num_layers, spec.num_experts
        maps = sum(_maps(tensor, spec) for tensor in carried)
        averages = sum(_maps(tensor, spec) for tensor in carried if tensor.dtype in FLOATS)
        context = sum(tensor.shape[0] for tensor in carried if len(tensor.shape) == 1)
        self.bias = nn.Parameter(torch.zeros(layers, experts))
        self.weights = nn.Parameter(torch.full((1, maps + averages, layers, 1), COPY))
        self.narrow = nn.Linear(context, rank, bias=False) if context else None
        self.widen = nn.Linear(rank, layers * experts, bias=False) if context else None
        if self.widen is not None:
            nn.init.zeros_(self.widen.weight)
        self.below, self.between, self.above, self.shift = (
            nn.Buffer(torch.full((layers, 1), value)) for value in IDENTITY
        )

    def logits(self, *state: Tensor) -> Float[Tensor, "B L E"]:
        """state: the tensors of `carried`."""
        shape = (self.spec.num_layers, self.spec.num_experts)
        maps = [_floats(x).flatten(1, -3) for x in state if x.shape[-2:] == shape and x.ndim > 3]
        logs = [
            torch.log(x.float().flatten(1, -3) + LITTLE)
            for x in state
            if x.ndim > 3 and x.is_floating_point()
        ]
        z = self.bias + (self.weights * torch.cat(maps + logs, 1)).sum(1)
        if self.narrow is None or self.widen is None:
            return z
        context = torch.cat([x.float() for x in state if x.ndim == 2], 1)
        return z + self.widen(self.narrow(context)).unflatten(1, shape)

    def forward(self, *state: Tensor) -> Float[Tensor, "B L E"]:
        """Calibrated probabilities."""
        tables = self.below, self.between, self.above - self.below, self.shift
        return torch.sigmoid(stretched(self.logits(*state), *tables))

    def calibrate(self, fitted: Float32[np.ndarray, "L 4"]) -> None:
        """Take in (below, between, above, bias) of each layer, as `calibration.three_slopes` finds them."""
        for number, table in enumerate((self.below, self.between, self.above, self.shift)):
            table[:, 0] = torch.from_numpy(fitted[:, number])


def readable(state: Sequence[StateTensor], spec: RoutingSpec) -> tuple[StateTensor, ...]:
    """The tensors of a state that an outlook can read: maps, float vectors. ExportFailed without any map."""
    found = tuple(t for t in state if _maps(t, spec) or (len(t.shape) == 1 and t.dtype in FLOATS))
    if not any(_maps(tensor, spec) for tensor in found):
        raise ExportFailed(
            f"The state has no tensor [n, {spec.num_layers}, {spec.num_experts}] of floats or uint8.",
            remedy="An outlook needs averages of past routing in the state.",
        )
    return found


def _floats(x: Tensor) -> Tensor:
    """Bytes as shares of the largest one."""
    return x.float() if x.is_floating_point() else x.float() * (1 / LARGEST_BYTE)


def _maps(tensor: StateTensor, spec: RoutingSpec) -> int:
    """How many maps it holds; 0 where it is something else."""
    is_map = len(tensor.shape) == 3 and tensor.shape[1:] == (spec.num_layers, spec.num_experts)
    return tensor.shape[0] if is_map and tensor.dtype in (*FLOATS, "uint8") else 0
