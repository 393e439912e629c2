"""`interlayer` and `multiscale` as they are served: two functions of a sequence, each exported as a graph.

trained `WindowPredictor` + calibration -> served() -> advance, predict -> `training.onnx_graph`

The state is the window's past: the routing of its tokens, and how many there are. Which layers tell of them
depends on how many of the present token were seen, so the trunk runs anew at each step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional

from model_store.manifest import ADVANCE, PREDICT
from training.calibration import Calibration
from training.operators import rows_at, shares
from training.predictors.window import WindowPredictor
from training.served import Served, tensor

# Expert ids below it fit into a byte.
BYTE_VALUES = 256


def served(predictor: WindowPredictor, calibration: Calibration) -> Served:
    """The two functions of a trained predictor, and what they pass on.

    state: routed, the experts of the window's past tokens, newest last; weights, their shares of the gates;
    past, how many tokens that is. Each takes all of it.
    """
    spec, earlier = predictor.spec, predictor.config.window - 1
    slots = (earlier, spec.num_layers * spec.top_k)
    state = (
        tensor("routed", "uint8" if spec.num_experts <= BYTE_VALUES else "int32", *slots),
        tensor("weights", "float32", *slots),
        tensor("past", "int32"),
    )
    names = tuple(t.name for t in state)
    return Served(
        graphs={PREDICT: Predict(predictor, calibration), ADVANCE: Advance(predictor)},
        reads={PREDICT: names, ADVANCE: names},
        state=state,
    )


class Predict(nn.Module):
    """Calibrated probabilities of every layer from the window's past and the layers seen so far."""

    def __init__(self, predictor: WindowPredictor, calibration: Calibration) -> None:
        super().__init__()
        self.predictor, self.calibration = predictor, calibration
        spec, contexts = predictor.spec, predictor.contexts
        layer = torch.arange(spec.num_layers)
        self.layer_number = nn.Buffer((layer + 1).int()[:, None])
        self.first = nn.Buffer((layer * spec.num_experts).int().repeat_interleave(spec.top_k))
        back = torch.arange(1, contexts[-1] + 1)
        tokens = torch.arange(predictor.config.window)
        self.places = nn.Buffer((tokens[:, None] * spec.num_layers - back).flatten())  # W*C
        means = [(back <= count) / count for count in contexts]
        self.means = nn.Buffer(torch.stack(means).repeat_interleave(spec.top_k, 1))  # scales C*K
        self.age = nn.Buffer(tokens.flip(0).int())

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B L E"]:
        """inputs: routed, weights, past, then token_id [B], experts [B, L, K], gates [B, L, K]."""
        routed, weights, past, _, experts, gates = inputs
        known = experts[:, :, :1] >= 0
        seen = (self.layer_number * known).amax((1, 2))
        rows = torch.cat([routed.int(), experts.clamp(min=0).flatten(1)[:, None]], 1) + self.first
        shown = torch.cat([weights, (shares(gates) * known).flatten(1)[:, None]], 1)
        told = self.told(rows, shown, seen.long())
        # With all layers seen nothing is left to forecast, yet a stream may ask.
        coming = seen.clamp(max=self.predictor.spec.num_layers - 1)
        told = told + self.predictor.layer.weight.index_select(0, coming)[:, None, None]
        present = self.age <= past[:, None]
        y = self.predictor.read(told.unbind(2), present, 1)
        return self.calibration(self.predictor.answer(y[:, 0]), seen)

    def told(
        self,
        rows: Int32[Tensor, "B W L*K"],
        weights: Float[Tensor, "B W L*K"],
        seen: Int64[Tensor, "B"],
    ) -> Float[Tensor, "B W scales D"]:
        """What each token tells by the layers before layer `seen`, but for the number of that layer."""
        spec, config = self.predictor.spec, self.predictor.config
        place = seen[:, None] + self.places  # B W*C
        inside, place = (place >= 0)[:, :, None], place.clamp(min=0)
        by_layer = (-1, config.window * spec.num_layers, spec.top_k)
        experts = rows_at(rows.view(by_layer), place)
        shown = rows_at(weights.view(by_layer), place) * inside
        embedded = functional.embedding(experts, self.predictor.experts.weight)  # B W*C K D
        by_token = (-1, config.window, 1, self.means.shape[1])
        return (shown.view(by_token) * self.means) @ embedded.view(*by_token[:2], by_token[3], config.width)


class Advance(nn.Module):
    """The state after one finished token: the window moves on by one."""

    def __init__(self, predictor: WindowPredictor) -> None:
        super().__init__()
        self.earlier = predictor.config.window - 1

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: routed, weights, past, then token_id, experts, gates."""
        routed, weights, past, _, experts, gates = inputs
        known = experts >= 0
        newest = experts.clamp(min=0).flatten(1)[:, None].to(routed.dtype)
        shown = (shares(gates) * known).flatten(1)[:, None]
        return (
            torch.cat([routed[:, 1:], newest], 1),
            torch.cat([weights[:, 1:], shown], 1),
            (past + 1).clamp(max=self.earlier),
        )
