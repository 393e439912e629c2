"""The predictors of `probes` as they are served: two functions of a sequence, each exported as a graph.

trained `Probe` + calibration -> served() -> advance, predict -> `training.onnx_graph`

There is nothing to remember: what a sequence carries is its last token id, which nobody reads, because
a version carries something.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model_store.manifest import ADVANCE, PREDICT
from training.calibration import Calibration
from training.predictors.probes import Probe
from training.served import Served, tensor


def served(predictor: Probe, calibration: Calibration) -> Served:
    """The two functions of a trained probe. state: last, the last token's id."""
    return Served(
        graphs={PREDICT: Predict(predictor, calibration), ADVANCE: Advance()},
        reads={PREDICT: (), ADVANCE: ()},
        state=(tensor("last", "int64"),),
        hidden_size=predictor.hidden_size,
    )


class Predict(nn.Module):
    """Calibrated probabilities of every layer from the hidden state, and from what is usual without one."""

    def __init__(self, predictor: Probe, calibration: Calibration) -> None:
        super().__init__()
        self.predictor, self.calibration = predictor, calibration
        self.layer_number = nn.Buffer(torch.arange(1, predictor.spec.num_layers + 1, dtype=torch.int32))

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B L E"]:
        """inputs: token_id [B], experts [B, L, K], gates [B, L, K], hidden [B, H]."""
        _, experts, _, hidden = inputs
        seen = (self.layer_number * (experts[:, :, 0] >= 0)).amax(1)
        told = self.predictor.reads(hidden, seen)
        logits = self.predictor.answer(hidden, seen.long())
        return self.calibration(logits, seen + self.calibration.first_row_told(told))


class Advance(nn.Module):
    """The state after one finished token."""

    def forward(self, *inputs: Tensor) -> tuple[Int64[Tensor, "B"]]:
        """inputs: token_id, experts, gates."""
        return (inputs[0].clone(),)
