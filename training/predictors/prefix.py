"""The `prefix` predictor: what was seen is summed up, looked at once, and answered for all layers at once.

Comes after `dataset`, before `loop` and `export`. The routed experts of the layers seen so far, each an
embedding weighted by its gate, are added up; so are averages over the routing of earlier tokens at several
time scales, and embeddings of the last token ids. A few residual blocks turn the sum into one logit for each
expert of each layer:

    x = sum_seen w(gate) A[layer, expert] + sum_scale B_scale h_scale + C [tokens] + d[last seen layer]
    z = head(norm(blocks(x)))

Averages commute with the embedding (mean of B x = B mean of x), so a served sequence carries S vectors of
`width` numbers instead of S x L x E averages, and a step costs the same whatever the history, L or E.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional

from model_store.manifest import StateTensor
from traces.spec import RoutingSpec
from training.calibration import Calibration
from training.config import PrefixConfig
from training.dataset import Batch
from training.vocabulary import Vocabulary


class Residual(nn.Module):
    """x + W2 gelu(W1 norm(x)); starts as the identity."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)
        self.dropout = dropout
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        hidden = functional.gelu(self.widen(self.norm(x)), approximate="tanh")
        return x + self.narrow(functional.dropout(hidden, self.dropout, self.training))


class PrefixPredictor(nn.Module):
    """The trainable form: dense inputs, several prefixes of the same token at once.

    spec, config, vocabulary: what it is for; kept for export.
    """

    name: ClassVar[str] = "prefix"

    def __init__(self, spec: RoutingSpec, config: PrefixConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.spec, self.config, self.vocabulary = spec, config, vocabulary
        inputs, scales = spec.num_layers * spec.num_experts, len(config.decays)
        routed = spec.num_layers * spec.top_k
        self.routing = nn.Linear(inputs, config.width, bias=False)
        self.history = nn.ModuleList(nn.Linear(inputs, config.width, bias=False) for _ in range(scales))
        self.last_seen = nn.Embedding(spec.num_layers + 1, config.width)
        self.tokens = nn.Embedding(vocabulary.num_rows, config.token_width, padding_idx=0)
        token_inputs = config.token_width * (config.recent_tokens + 1)
        self.token_trunk = nn.Linear(token_inputs, config.width, bias=False)
        self.blocks = nn.Sequential(
            *(Residual(config.width, config.hidden, config.dropout) for _ in range(config.blocks))
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, inputs)
        # A sum of `routed` embeddings then has entries near 1.
        nn.init.normal_(self.routing.weight, std=1 / math.sqrt(routed))
        for weight in self.history.parameters():
            nn.init.normal_(weight, std=0.5 / math.sqrt(routed * scales))
        nn.init.normal_(self.last_seen.weight, std=0.02)

    def forward(
        self, batch: Batch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "B P L E"]:
        """Logits of every expert of every layer, for each token with its first `seen` layers known.

        rows: of the token table, for the batch's token ids, 0 where unknown (`Vocabulary.rows`).
        """
        x = self.encode_token(batch, rows)[:, None] + self.prefix_sums(batch, seen) + self.last_seen(seen)
        return self.answer(x)

    def prefix_sums(self, batch: Batch, seen: Int64[Tensor, "B P"]) -> Float[Tensor, "B P D"]:
        """Sum of the embeddings of the experts of the first `seen` layers, all from one running sum."""
        spec, width = self.spec, self.config.width
        table = self.routing.weight.view(width, spec.num_layers, spec.num_experts)
        layers = torch.einsum("ble,dle->bld", self._drop(batch.routing), table)
        sums = functional.pad(layers.cumsum(1), (0, 0, 1, 0))  # B L+1 D
        return sums.gather(1, seen[..., None].expand(-1, -1, width))

    def encode_token(self, batch: Batch, rows: Int64[Tensor, "B R"]) -> Float[Tensor, "B D"]:
        """The share of x that is the same for every prefix of a token: its history and its ids."""
        histories = self._drop(batch.history.flatten(2)).unbind(1)  # S times B LE
        parts = [scale(history) for scale, history in zip(self.history, histories, strict=True)]
        x = torch.stack(parts).sum(0)
        if len(self.vocabulary.known):
            x = x + self.token_trunk(self._drop(self.tokens(rows)).flatten(1))
        return x

    def answer(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B L E"]:
        """Logits from the summed-up input."""
        x = functional.dropout(self.norm(self.blocks(x)), self.config.dropout, self.training)
        logits: Tensor = self.head(x)
        return logits.unflatten(-1, (self.spec.num_layers, self.spec.num_experts))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.config.input_dropout, self.training)

    def graphs(self, calibration: Calibration) -> tuple[Predict, Advance, tuple[StateTensor, ...]]:
        """The two functions that are exported, and the state they pass on."""
        state = (
            StateTensor(name="history", dtype="float32", shape=(len(self.config.decays), self.config.width)),
            StateTensor(name="recent", dtype="int32", shape=(self.config.recent_tokens,)),
        )
        return Predict(self, calibration), Advance(self), state


class RoutedSum(nn.Module):
    """Sum of the embeddings of all routed experts, each weighted as `training.dataset.gate_weights` says."""

    def __init__(self, spec: RoutingSpec, table: Float[Tensor, "LE D"]) -> None:
        super().__init__()
        self.spec = spec
        self.table = nn.Buffer(table.detach().contiguous())
        self.first_row = nn.Buffer(torch.arange(spec.num_layers)[:, None] * spec.num_experts)

    def forward(self, experts: Int32[Tensor, "B L K"], gates: Float[Tensor, "B L K"]) -> Float[Tensor, "B D"]:
        routed = (experts >= 0).float()
        share = gates * routed
        share = share / share.sum(-1, keepdim=True).clamp(min=1e-9)
        weight = (0.5 + 0.5 * self.spec.top_k * share) * routed
        rows = functional.embedding((experts.clamp(min=0) + self.first_row).flatten(1), self.table)  # B LK D
        return (weight.flatten(1)[:, None] @ rows).squeeze(1)


class Predict(nn.Module):
    """Calibrated probabilities of every layer from the state, the token id and the layers seen so far."""

    def __init__(self, predictor: PrefixPredictor, calibration: Calibration) -> None:
        super().__init__()
        self.predictor, self.calibration = predictor, calibration
        self.routed_sum = RoutedSum(predictor.spec, predictor.routing.weight.T)
        self.layer_number = nn.Buffer(torch.arange(1, predictor.spec.num_layers + 1, dtype=torch.int32))
        self.row_of_id = nn.Buffer(_row_of_id(predictor.vocabulary))

    def forward(
        self,
        history: Float[Tensor, "B S D"],
        recent: Int32[Tensor, "B R"],
        token_id: Int64[Tensor, "B"],
        experts: Int32[Tensor, "B L K"],
        gates: Float[Tensor, "B L K"],
    ) -> Float[Tensor, "B L E"]:
        seen = (self.layer_number * (experts[:, :, 0] >= 0)).amax(1)  # B, 0 where no layer is
        x = history.sum(1) + self.routed_sum(experts, gates) + self.predictor.last_seen(seen)
        if len(self.predictor.vocabulary.known):
            ids = torch.cat([token_id[:, None] + 1, recent], 1)  # ids + 1: 0 is unknown
            rows = functional.embedding(ids.clamp(0, len(self.row_of_id) - 1), self.row_of_id[:, None])
            x = x + self.predictor.token_trunk(self.predictor.tokens(rows.squeeze(-1)).flatten(1))
        return self.calibration(self.predictor.answer(x), seen, token_id >= 0)


class Advance(nn.Module):
    """The state after one finished token: each average takes in its routing, the ids move up by one."""

    def __init__(self, predictor: PrefixPredictor) -> None:
        super().__init__()
        scales = torch.stack([weight.T for weight in predictor.history.parameters()], 1)  # LE S D
        self.routed_sum = RoutedSum(predictor.spec, scales.flatten(1))
        self.decays = nn.Buffer(torch.tensor(predictor.config.decays)[:, None])

    def forward(
        self,
        history: Float[Tensor, "B S D"],
        recent: Int32[Tensor, "B R"],
        token_id: Int64[Tensor, "B"],
        experts: Int32[Tensor, "B L K"],
        gates: Float[Tensor, "B L K"],
    ) -> tuple[Float[Tensor, "B S D"], Int32[Tensor, "B R"]]:
        token = self.routed_sum(experts, gates).view_as(history)
        newest = (token_id.clamp(min=-1) + 1).to(recent.dtype)[:, None]
        history = self.decays * history + (1 - self.decays) * token
        return history, torch.cat([newest, recent[:, :-1]], 1)


def _row_of_id(vocabulary: Vocabulary) -> Int64[Tensor, "V"]:
    """Row of each id, shifted by one so that -1 comes first; ids past the end share the row of the last."""
    largest = int(vocabulary.known[-1]) + 1 if len(vocabulary.known) else 0
    return torch.from_numpy(vocabulary.rows(np.arange(-1, largest + 1)))
