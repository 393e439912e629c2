"""The `ensemble` predictor as it is served: its members' functions side by side in one graph.

trained `EnsemblePredictor` + calibration -> served() -> advance, predict -> `training.onnx_graph`

The state is the members' states, a member's name before each tensor's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from model_store.manifest import ADVANCE, PREDICT, GraphName
from training.calibration import Calibration
from training.predictors import prefix_graphs, window_graphs
from training.predictors.ensemble import EnsemblePredictor
from training.predictors.prefix import PrefixPredictor
from training.served import Served, tensor


class Raw(Calibration):
    """What stands for calibration in a member: it answers with logits."""

    def forward(self, logits: Float[Tensor, "B L E"], row: Int32[Tensor, "B"]) -> Float[Tensor, "B L E"]:
        """The logits."""
        return logits


def served(predictor: EnsemblePredictor, calibration: Calibration) -> Served:
    """The two functions of a trained ensemble; their state is that of the members."""
    spec, members = predictor.spec, {}
    for name, member in predictor.members.items():
        take_apart = prefix_graphs.served if isinstance(member, PrefixPredictor) else window_graphs.served
        members[name] = take_apart(member, Raw(spec.num_layers, spec.top_k))  # type: ignore[arg-type]
    return Served(
        graphs={
            PREDICT: Predict(predictor, members, calibration),
            ADVANCE: Members(members, ADVANCE),
        },
        reads={name: _reads(members, name) for name in (PREDICT, ADVANCE)},
        state=tuple(
            tensor(f"{name}_{t.name}", t.dtype, *t.shape)
            for name, functions in members.items()
            for t in functions.state
        ),
    )


def _reads(members: Mapping[str, Served], graph: GraphName) -> tuple[str, ...]:
    return tuple(f"{name}_{read}" for name, member in members.items() for read in member.reads[graph])


class Members(nn.Module):
    """One of the functions of every member: their answers one after another."""

    def __init__(self, members: Mapping[str, Served], graph: GraphName) -> None:
        super().__init__()
        self.functions = nn.ModuleList(member.graphs[graph] for member in members.values())
        self.reads = [len(member.reads[graph]) for member in members.values()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: what each member reads of its state, member by member, then token_id, experts, gates."""
        *state, token_id, experts, gates = inputs
        answers: list[Tensor] = []
        for function, count in zip(self.functions, self.reads, strict=True):
            answer = function(*state[:count], token_id, experts, gates)
            answers += answer if isinstance(answer, tuple) else (answer,)
            state = state[count:]
        return tuple(answers)


class Predict(nn.Module):
    """Calibrated probabilities of every layer, from the average of the members' logits."""

    def __init__(
        self, predictor: EnsemblePredictor, members: Mapping[str, Served], calibration: Calibration
    ) -> None:
        super().__init__()
        self.members, self.calibration = Members(members, PREDICT), calibration
        self.weights = nn.Buffer(predictor.weights.clone()[:, None, None, None])
        self.layer_number = nn.Buffer(torch.arange(1, predictor.spec.num_layers + 1, dtype=torch.int32))

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B L E"]:
        """inputs: as `Members` takes them."""
        *_, token_id, experts, _ = inputs
        logits = (torch.stack(self.members(*inputs)) * self.weights).sum(0)
        seen = (self.layer_number * (experts[:, :, 0] >= 0)).amax(1)
        return self.calibration(logits, self.calibration.first_row(token_id >= 0) + seen)
