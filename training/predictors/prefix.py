"""The `prefix` predictor: what was seen is summed up, looked at once, and answered for all layers at once.

Comes after `dataset`, before `loop` and `export`. The routed experts of the layers seen so far, each an
embedding that its gate shifts, are added up twice: all layers alike, and fading with their distance from the
last one. Earlier tokens are embedded likewise and averaged at several time scales; the last token ids have
embeddings of their own. A few residual blocks turn the sum into a logit for each expert of each layer:

    a_l = sum_k A[l, e_k] + offset(gate_k) A'[l, e_k]            l: a layer seen
    x = sum_l a_l + F sum_l fade^(last - l) a_l + sum_scale mean_scale(b_scale) + C [tokens] + d[last]
    z = head(norm(blocks(x)))                                    b_scale: a past token, by tables of its own

Averages commute with embedding (the mean of embeddings is the embedding of the mean), so a served sequence
carries S vectors of `width` numbers instead of S x L x E averages, and a step costs the same whatever the
history.
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
from training.dataset import MIN_SHARE, TINY, Batch
from training.dropout import dropout
from training.vocabulary import Vocabulary

# A token seen only a few times should say little, not something at random.
SMALL = 0.02


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
        return x + self.narrow(dropout(hidden, self.dropout, self.training))


class PrefixPredictor(nn.Module):
    """The trainable form: dense inputs, several prefixes of the same token at once.

    spec, config, vocabulary: what it is for; kept for export.
    """

    name: ClassVar[str] = "prefix"

    def __init__(self, spec: RoutingSpec, config: PrefixConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.spec, self.config, self.vocabulary = spec, config, vocabulary
        outputs, scales = spec.num_layers * spec.num_experts, len(config.decays)
        inputs = 2 * outputs  # routed or not, and by how much
        self.routing = nn.Linear(inputs, config.width, bias=False)
        self.fading = nn.Linear(config.width, config.width, bias=False)
        self.history = nn.ModuleList(nn.Linear(inputs, config.width, bias=False) for _ in range(scales))
        self.last_seen = nn.Embedding(spec.num_layers + 1, config.width)
        self.layer_weights = nn.Buffer(layer_weights(spec.num_layers, config.layer_decay), persistent=False)
        self.tokens = nn.Embedding(vocabulary.num_rows, config.token_width, padding_idx=0)
        token_inputs = config.token_width * (config.recent_tokens + 1)
        self.token_trunk = nn.Linear(token_inputs, config.width, bias=False)
        self.blocks = nn.Sequential(
            *(Residual(config.width, config.hidden, config.dropout) for _ in range(config.blocks))
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, outputs)
        # A sum over all routed experts then has entries near 1, all scales together near 0.5.
        routed = spec.num_layers * spec.top_k
        nn.init.normal_(self.routing.weight, std=0.7 / math.sqrt(routed))
        for weight in self.history.parameters():
            nn.init.normal_(weight, std=0.35 / math.sqrt(routed * scales))
        nn.init.normal_(self.last_seen.weight, std=SMALL)
        nn.init.normal_(self.tokens.weight[1:], std=SMALL)  # row 0, no id, stays 0

    def forward(
        self, batch: Batch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "B P L E"]:
        """Logits of every expert of every layer, for each token with its first `seen` layers known.

        rows: of the token table, for the batch's token ids, 0 where unknown (`Vocabulary.rows`).
        """
        x = self.encode_token(batch, rows)[:, None] + self.prefix_sums(batch, seen) + self.last_seen(seen)
        return self.answer(x)

    def prefix_sums(self, batch: Batch, seen: Int64[Tensor, "B P"]) -> Float[Tensor, "B P D"]:
        """The share of x that comes from the first `seen` layers of this token."""
        spec, width = self.spec, self.config.width
        table = self.routing.weight.view(width, spec.num_layers, 2, spec.num_experts)
        layers = torch.einsum("blce,dlce->bld", self._drop(batch.routing), table)
        plain, faded = (weights[seen] @ layers for weights in self.layer_weights)
        return plain + self.fading(faded)

    def encode_token(self, batch: Batch, rows: Int64[Tensor, "B R"]) -> Float[Tensor, "B D"]:
        """The share of x that is the same for every prefix of a token: its history and its ids."""
        averages = self._drop(batch.history.flatten(2)).unbind(1)  # S times B F
        x = torch.stack([table(mean) for table, mean in zip(self.history, averages, strict=True)]).sum(0)
        if len(self.vocabulary.known):
            x = x + self.token_trunk(self._drop(self.tokens(rows)).flatten(1))
        return x

    def answer(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B L E"]:
        """Logits from the summed-up input."""
        x = dropout(self.norm(self.blocks(x)), self.config.dropout, self.training)
        logits: Tensor = self.head(x)
        return logits.unflatten(-1, (self.spec.num_layers, self.spec.num_experts))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.config.input_dropout, self.training)

    def graphs(self, calibration: Calibration) -> tuple[Predict, Advance, tuple[StateTensor, ...]]:
        """The two functions that are exported, and the state they pass on."""
        state = (
            StateTensor(name="history", dtype="float32", shape=(len(self.config.decays), self.config.width)),
            StateTensor(name="recent", dtype="int32", shape=(self.config.recent_tokens,)),
        )
        return Predict(self, calibration), Advance(self), state


def layer_weights(num_layers: int, decay: float) -> Float[Tensor, "2 L+1 L"]:
    """What each layer counts once the first `seen` are known: all alike; fading from the last one back."""
    age = torch.arange(num_layers + 1)[:, None] - 1 - torch.arange(num_layers)
    return torch.stack([age >= 0, (age >= 0) * decay ** age.clamp(min=0)])


class Embedded(nn.Module):
    """Embeddings of routed experts: rows of tables, side by side, whose row (l, c, e) is expert e of layer l.

    Channel c = 0 is for being routed, channel 1 counts times `training.dataset.gate_offsets`.
    """

    def __init__(self, spec: RoutingSpec, *tables: Tensor) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.cat([table.detach().T for table in tables], 1).contiguous())
        channel = torch.arange(spec.num_layers * 2).view(spec.num_layers, 2, 1)
        self.first_row = nn.Buffer(channel * spec.num_experts)

    def forward(
        self, experts: Int32[Tensor, "B L K"], gates: Float[Tensor, "B L K"]
    ) -> tuple[Float[Tensor, "B L 2 K"], Float[Tensor, "B L*2*K N"]]:
        """(weights, rows); experts of -1 weigh 0."""
        routed = (experts >= 0).float()
        gates = gates * routed
        share = gates / gates.sum(-1, keepdim=True).clamp(min=TINY)
        logs = share.clamp(min=MIN_SHARE).log()
        offsets = (logs - logs.mean(-1, keepdim=True)) * routed
        rows = (experts.clamp(min=0)[:, :, None] + self.first_row).flatten(1)
        return torch.stack([routed, offsets], 2), functional.embedding(rows, self.table)


class Predict(nn.Module):
    """Calibrated probabilities of every layer from the state, the token id and the layers seen so far."""

    def __init__(self, predictor: PrefixPredictor, calibration: Calibration) -> None:
        super().__init__()
        self.predictor, self.calibration = predictor, calibration
        self.embedded = Embedded(predictor.spec, predictor.routing.weight)
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
        x = history.sum(1) + self._routing_sums(experts, gates, seen) + self.predictor.last_seen(seen)
        if len(self.predictor.vocabulary.known):
            ids = torch.cat([token_id[:, None] + 1, recent], 1)  # ids + 1: 0 is unknown
            rows = functional.embedding(ids.clamp(0, len(self.row_of_id) - 1), self.row_of_id[:, None])
            x = x + self.predictor.token_trunk(self.predictor.tokens(rows.squeeze(-1)).flatten(1))
        return self.calibration(self.predictor.answer(x), seen, token_id >= 0)

    def _routing_sums(
        self, experts: Int32[Tensor, "B L K"], gates: Float[Tensor, "B L K"], seen: Int32[Tensor, "B"]
    ) -> Float[Tensor, "B D"]:
        weights, rows = self.embedded(experts, gates)
        fade = functional.embedding(seen, self.predictor.layer_weights[1])[:, :, None, None]
        sums = torch.stack([weights.flatten(1), (weights * fade).flatten(1)], 1) @ rows  # B 2 D
        return sums[:, 0] + self.predictor.fading(sums[:, 1])


class Advance(nn.Module):
    """The state after one finished token: each average takes in its routing, the ids move up by one."""

    def __init__(self, predictor: PrefixPredictor) -> None:
        super().__init__()
        self.embedded = Embedded(predictor.spec, *predictor.history.parameters())
        self.decays = nn.Buffer(torch.tensor(predictor.config.decays)[:, None])

    def forward(
        self,
        history: Float[Tensor, "B S D"],
        recent: Int32[Tensor, "B R"],
        token_id: Int64[Tensor, "B"],
        experts: Int32[Tensor, "B L K"],
        gates: Float[Tensor, "B L K"],
    ) -> tuple[Float[Tensor, "B S D"], Int32[Tensor, "B R"]]:
        weights, rows = self.embedded(experts, gates)
        token = (weights.flatten(1)[:, None] @ rows).view_as(history)
        newest = (token_id.clamp(min=-1) + 1).to(recent.dtype)[:, None]
        history = self.decays * history + (1 - self.decays) * token
        return history, torch.cat([newest, recent[:, :-1]], 1)


def _row_of_id(vocabulary: Vocabulary) -> Int64[Tensor, "V"]:
    """Row of each id, shifted by one so that -1 comes first; ids past the end share the row of the last."""
    largest = int(vocabulary.known[-1]) + 1 if len(vocabulary.known) else 0
    return torch.from_numpy(vocabulary.rows(np.arange(-1, largest + 1)))
