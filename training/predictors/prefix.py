"""The `prefix` predictor: what was seen is summed up, looked at once, and answered for all layers at once.

Comes after `dataset`, before `loop` and `export`. The routed experts of the layers seen so far, each an
embedding that its gate shifts, are added up twice: all layers alike, and fading with their distance from the
last one. Earlier routing comes in as Q dense maps [L, E]: averages of past tokens at several time scales, and
of the earlier places of this very token (`training.repeats`). The maps take two ways. Into the trunk, by an
embedding they share; and past it, straight to the logits, each layer of each map times a number that the
trunk says:

    a_l = sum_k A[l, e_k] + offset(gate_k) A'[l, e_k]            l: a layer seen
    x = sum_l a_l + F sum_l fade^(last - l) a_l + sum_q M_q (M map_q) + C [tokens] + d[last]
    y = norm(blocks(x))
    z[l, e] = head(y)[l, e] + sum_q copy(y)[q, l] map_q[l, e]

A trunk of 192 numbers cannot carry which of 768 experts were routed to; the second way need not squeeze them
through. What the past adds to x is added up once a token, in `advance`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional

from model_store.manifest import StateTensor
from traces.spec import RoutingSpec
from training.calibration import Calibration
from training.config import PrefixConfig
from training.dataset import TINY, Batch
from training.dropout import dropout
from training.repeats import ORDERS, place_weights
from training.vocabulary import Vocabulary

# A token seen only a few times should say little, not something at random.
SMALL = 0.02
# What each earlier map counts in the logits before anything is learnt.
COPY = 0.3
# Expert ids below it fit into a byte.
BYTE_VALUES = 256


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

    spec, config, vocabulary: what it is for; kept for export. Without a vocabulary, repeats are not used.
    """

    name: ClassVar[str] = "prefix"

    def __init__(self, spec: RoutingSpec, config: PrefixConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.spec, self.config, self.vocabulary = spec, config, vocabulary
        self.reads_ids = bool(len(vocabulary.known))
        outputs, width = spec.num_layers * spec.num_experts, config.width
        self.maps = len(config.decays) + (ORDERS if self.reads_ids else 0)
        self.routing = nn.Linear(2 * outputs, width, bias=False)  # routed or not, and by how much
        self.fading = nn.Linear(width, width, bias=False)
        self.earlier = nn.Linear(outputs, config.earlier_width, bias=False)
        self.earlier_trunk = nn.Linear(config.earlier_width * self.maps, width, bias=False)
        self.last_seen = nn.Embedding(spec.num_layers + 1, width)
        self.layer_weights = nn.Buffer(layer_weights(spec.num_layers, config.layer_decay), persistent=False)
        self.tokens = nn.Embedding(vocabulary.num_rows, config.token_width, padding_idx=0)
        self.token_trunk = nn.Linear(config.token_width * (config.recent_tokens + 1), width, bias=False)
        self.blocks = nn.Sequential(
            *(Residual(width, config.hidden, config.dropout) for _ in range(config.blocks))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self.copy = nn.Linear(width, self.maps * spec.num_layers)
        # A sum over all routed experts then has entries near 1, all maps together near 0.5.
        routed = spec.num_layers * spec.top_k
        nn.init.normal_(self.routing.weight, std=0.7 / math.sqrt(routed))
        nn.init.normal_(self.earlier.weight, std=0.35 / math.sqrt(routed))
        nn.init.normal_(self.last_seen.weight, std=SMALL)
        nn.init.normal_(self.tokens.weight[1:], std=SMALL)  # row 0, no id, stays 0
        nn.init.zeros_(self.copy.weight)
        nn.init.constant_(self.copy.bias, COPY)

    def forward(
        self, batch: Batch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "B P L E"]:
        """Logits of every expert of every layer, for each token with its first `seen` layers known.

        rows: of the token table, for the batch's token ids, 0 where unknown (`Vocabulary.rows`).
        """
        maps = torch.cat([batch.averages, batch.repeats], 1) if self.reads_ids else batch.averages
        x = self.encode_past(maps, rows)[:, None] + self.prefix_sums(batch, seen) + self.last_seen(seen)
        y = dropout(self.norm(self.blocks(x)), self.config.dropout, self.training)
        logits = self.head(y).unflatten(-1, (self.spec.num_layers, self.spec.num_experts))
        shares = self.copy(y).unflatten(-1, (self.maps, self.spec.num_layers))
        copied: Tensor = torch.einsum("bpql,bqle->bple", shares, maps)
        return logits + copied

    def prefix_sums(self, batch: Batch, seen: Int64[Tensor, "B P"]) -> Float[Tensor, "B P D"]:
        """The share of x that comes from the first `seen` layers of this token."""
        spec, width = self.spec, self.config.width
        table = self.routing.weight.view(width, spec.num_layers, 2, spec.num_experts)
        layers = torch.einsum("blce,dlce->bld", self._drop(batch.routing), table)
        plain, faded = (weights[seen] @ layers for weights in self.layer_weights)
        return plain + self.fading(faded)

    def encode_past(self, maps: Float[Tensor, "B Q L E"], rows: Int64[Tensor, "B R"]) -> Float[Tensor, "B D"]:
        """The share of x that is the same for every prefix of a token: earlier routing and the ids."""
        x: Tensor = self.earlier_trunk(self.earlier(self._drop(maps.flatten(2))).flatten(1))
        return x + self.token_trunk(self._drop(self.tokens(rows)).flatten(1)) if self.reads_ids else x

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.config.input_dropout, self.training)

    def graphs(self, calibration: Calibration) -> tuple[Predict, Advance, tuple[StateTensor, ...]]:
        """The two functions that are exported, and the state they pass on.

        context: what the past adds to x. maps: Q x L x E, the averages, then empty ones for the repeats.
        ids: of the window's tokens, newest first, + 1, 0 where unknown; then the same, but for those that
        came after the newest id only. routed: the window's experts.
        """
        spec, config = self.spec, self.config
        state = [
            StateTensor(name="context", dtype="float32", shape=(config.width,)),
            StateTensor(
                name="maps", dtype="float32", shape=(self.maps * spec.num_layers * spec.num_experts,)
            ),
        ]
        if self.reads_ids:
            window = (config.window, spec.num_layers * spec.top_k)
            small = spec.num_experts <= BYTE_VALUES
            state += [
                StateTensor(name="ids", dtype="int64", shape=(ORDERS, config.window)),
                StateTensor(name="routed", dtype="uint8" if small else "int32", shape=window),
            ]
        return Predict(self, calibration), Advance(self), tuple(state)


def layer_weights(num_layers: int, decay: float) -> Float[Tensor, "2 L+1 L"]:
    """What each layer counts once the first `seen` are known: all alike; fading from the last one back."""
    age = torch.arange(num_layers + 1)[:, None] - 1 - torch.arange(num_layers)
    return torch.stack([age >= 0, (age >= 0) * decay ** age.clamp(min=0)])


class Predict(nn.Module):
    """Calibrated probabilities of every layer from the state, the token id and the layers seen so far.

    One operator costs ONNX Runtime a microsecond whatever it does, hence what is tabled here beforehand.
    """

    def __init__(self, predictor: PrefixPredictor, calibration: Calibration) -> None:
        super().__init__()
        self.predictor, self.calibration = predictor, calibration
        spec, config, averages = predictor.spec, predictor.config, len(predictor.config.decays)
        slots = spec.num_layers * spec.top_k
        # Of a layer's rows the first, for a slot not seen, is 0; embeddings come first, what gates add after.
        table = predictor.routing.weight.detach().view(config.width, spec.num_layers, 2, spec.num_experts)
        table = functional.pad(table.permute(2, 1, 3, 0), (0, 0, 1, 0))  # 2 L E+1 D
        self.embeddings = nn.Buffer(table.reshape(-1, config.width))
        rows = torch.arange(2 * spec.num_layers, dtype=torch.int32) * (spec.num_experts + 1) + 1
        self.first_row = nn.Buffer(rows.repeat_interleave(spec.top_k).view(2, slots))
        self.layer_number = nn.Buffer(torch.arange(1, spec.num_layers + 1, dtype=torch.int32)[:, None])
        counts = predictor.layer_weights.transpose(0, 1).repeat_interleave(spec.top_k, 2)
        self.counts = nn.Buffer(counts[:, :, None].contiguous())  # by layers seen: 2 1 L*K
        self.per_share = nn.Buffer(torch.tensor([[0.0], [spec.top_k]]))
        self.at_none = nn.Buffer(torch.tensor([[1.0], [-1.0]]))
        self.ones = nn.Buffer(torch.ones(1, predictor.maps))
        trunk = [predictor.fading.weight]
        if predictor.reads_ids:
            self.row_of_id = nn.Buffer(_row_of_id(predictor.vocabulary))
            self.newest_first = nn.Buffer(torch.linspace(1, 1 / config.window, config.window))
            weights = place_weights(config.repeats, config.repeat_decay).repeat(ORDERS)
            self.weights = nn.Buffer(weights[:, None].repeat(1, slots))
            place = torch.arange(ORDERS * config.repeats)[:, None]
            layer = torch.arange(spec.num_layers).repeat_interleave(spec.top_k)
            first = ((averages + place // config.repeats) * spec.num_layers + layer) * spec.num_experts
            self.first_of_place = nn.Buffer(first)  # 2*J L*K
            trunk += [predictor.token_trunk.weight[:, : config.token_width]]
            trunk += [predictor.earlier_trunk.weight[:, config.earlier_width * averages :]]
        self.trunk = nn.Buffer(torch.cat(trunk, 1).detach())

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B L E"]:
        """inputs: the state's tensors, then token_id [B], experts [B, L, K], gates [B, L, K]."""
        context, maps, *past, token_id, experts, gates = inputs
        predictor = self.predictor
        known = token_id >= 0
        seen = torch.where(experts >= 0, self.layer_number, 0).amax((1, 2))  # B, 0 where no layer is
        plain, faded = self._prefix_sums(experts, gates, seen)
        told = [faded]
        if predictor.reads_ids:
            ids, routed = past
            maps = self._with_repeats(maps, ids, routed, torch.where(known, token_id + 1, -1))
            row = self.row_of_id.index_select(0, (token_id + 1).clamp(0, len(self.row_of_id) - 1))
            repeats = maps[:, -ORDERS * predictor.earlier.in_features :].unflatten(1, (ORDERS, -1))
            told += [predictor.tokens.weight.index_select(0, row), predictor.earlier(repeats).flatten(1)]
        start = context + plain + predictor.last_seen.weight.index_select(0, seen)
        x = torch.addmm(start, torch.cat(told, 1), self.trunk.T)
        y = predictor.norm(predictor.blocks(x))
        maps = maps.unflatten(1, (predictor.maps, predictor.spec.num_layers, predictor.spec.num_experts))
        shares = predictor.copy(y).view(-1, predictor.maps, predictor.spec.num_layers, 1)
        copied = self.ones @ (shares * maps).flatten(2)  # a sum, cheaper so
        logits = (predictor.head(y)[:, None] + copied).view_as(maps[:, 0])
        return self.calibration(logits, seen, known)

    def _prefix_sums(
        self, experts: Int32[Tensor, "B L K"], gates: Float[Tensor, "B L K"], seen: Int32[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Of the layers seen, all alike and fading; a layer that was passed over counts nothing."""
        share = gates / gates.sum(-1, keepdim=True).clamp(min=TINY)
        slots = self.first_row.shape[1]
        told = share.view(-1, 1, 1, slots) * self.per_share + self.at_none  # 1, and the gate offset
        weights = self.counts.index_select(0, seen) * told  # B 2 2 L*K
        rows = functional.embedding(experts.view(-1, 1, slots) + self.first_row, self.embeddings)
        sums = weights.flatten(2) @ rows.flatten(1, 2)
        return sums[:, 0], sums[:, 1]

    def _with_repeats(
        self,
        maps: Float[Tensor, "B Q*L*E"],
        ids: Int64[Tensor, "B 2 T"],
        routed: Int[Tensor, "B T L*K"],
        wanted: Int64[Tensor, "B"],
    ) -> Float[Tensor, "B Q*L*E"]:
        """The maps with `training.repeats` in the empty ones. wanted: what to look for among `ids`."""
        same = ids == wanted[:, None, None]
        newest, place = torch.where(same, self.newest_first, 0.0).topk(self.predictor.config.repeats)
        count, slots = self.weights.shape
        place = place.view(-1, count, 1).expand(-1, -1, slots)
        target = routed.gather(1, place).long() + self.first_of_place  # B 2*J L*K
        weights = torch.where((newest > 0).view(-1, count, 1), self.weights, 0.0)
        return maps.scatter_add(1, target.flatten(1), weights.flatten(1))


class Advance(nn.Module):
    """The state after one finished token: averages take in its routing, the window moves on by one token."""

    def __init__(self, predictor: PrefixPredictor) -> None:
        super().__init__()
        self.predictor = predictor
        config = predictor.config
        self.averages = len(config.decays)
        empty = torch.zeros(predictor.maps - self.averages)
        decays = torch.tensor(config.decays)
        self.keep = nn.Buffer(torch.cat([decays, empty])[:, None, None])
        self.take = nn.Buffer(torch.cat([1 - decays, empty])[:, None, None])
        averages_trunk = predictor.earlier_trunk.weight[:, : config.earlier_width * self.averages]
        self.averages_trunk = nn.Buffer(averages_trunk.detach())
        if predictor.reads_ids:
            self.row_of_id = nn.Buffer(_row_of_id(predictor.vocabulary))
            self.recent_trunk = nn.Buffer(predictor.token_trunk.weight[:, config.token_width :].detach())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: as of `Predict`; neither the old context nor gates are of use to it."""
        _, maps, *past, token_id, experts, _ = inputs
        predictor, spec = self.predictor, self.predictor.spec
        maps = maps.unflatten(1, (-1, spec.num_layers, spec.num_experts))
        routed_now = torch.zeros_like(maps[:, 0]).scatter(2, experts.long(), 1.0)
        maps = self.keep * maps + self.take * routed_now[:, None]
        averages = maps[:, : self.averages].flatten(2)
        context = predictor.earlier(averages).flatten(1) @ self.averages_trunk.T
        if not predictor.reads_ids:
            return context, maps.flatten(1)
        ids, routed = past
        newest = (token_id.clamp(min=-1) + 1)[:, None]
        before = torch.cat([newest, ids[:, 0, :-1]], 1)  # B T, the newest first
        # Those that came after the same id as the next token will, unless that id is unknown.
        follows = (before[:, 1:] == newest) & (newest > 0)
        after = functional.pad(before[:, :-1] * follows, (0, 1))
        recent = before[:, : predictor.config.recent_tokens].clamp(max=len(self.row_of_id) - 1)
        tokens = functional.embedding(self.row_of_id.take(recent), predictor.tokens.weight)
        context = context + tokens.flatten(1) @ self.recent_trunk.T
        window = torch.cat([experts.flatten(1)[:, None].to(routed.dtype), routed[:, :-1]], 1)
        return context, maps.flatten(1), torch.stack([before, after], 1), window


def _row_of_id(vocabulary: Vocabulary) -> Int32[Tensor, "V"]:
    """Row of each id, shifted by one so that -1 comes first; ids past the end share the row of the last."""
    largest = int(vocabulary.known[-1]) + 1 if len(vocabulary.known) else 0
    return torch.from_numpy(vocabulary.rows(np.arange(-1, largest + 1)).astype(np.int32))
