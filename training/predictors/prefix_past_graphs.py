"""The `prefix` predictor as it is served, between tokens: `Advance`, what a finished one leaves behind, and
`Begin`, what the next one's id adds.

Part of `training.predictors.prefix_graphs`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional

from traces.spec import RoutingSpec
from training.calibration import Calibration
from training.operators import falling, shares
from training.predictors.prefix import PrefixPredictor
from training.predictors.similar_graphs import Preceding, alike, at_places
from training.repeats import ORDERS, RANK_SPREAD, place_weights, rank_weights
from training.vocabulary import MOST_ROWS, PAIR_SLOTS, UNKNOWN_ROW, Vocabulary

# Ids are kept + 1 in 32 bits, some of them negative: none of them is equal to LIKE_NONE.
LARGEST_ID = 2**31 - 2
LIKE_NONE = -(2**31)
# Roots of repeats, at most that of the first rank, are kept in bytes of so many to 1: of 10,000 open
# sequences that saves 46 MB, and averages in half precision 31 MB.
PER_WEIGHT = math.floor(255 / math.sqrt(1 + RANK_SPREAD))


def per_root(spec: RoutingSpec) -> float:
    """What a byte of the last token's map counts for 1: an expert weighs K at most, and roots are kept."""
    return 255 / math.sqrt(spec.top_k)


class Begin(nn.Module):
    """What past and id add to x, and the maps of the places where the id was before."""

    def __init__(self, predictor: PrefixPredictor, calibration: Calibration) -> None:
        super().__init__()
        self.predictor, self.calibration = predictor, calibration
        spec, config = predictor.spec, predictor.config
        if not predictor.reads_ids:
            return
        vocabulary = predictor.vocabulary
        self.row_of_id = nn.Buffer(_row_of_id(vocabulary))
        self.key_step = vocabulary.key_step
        self.pair_at, self.pair_key = map(nn.Buffer, _pairs(vocabulary))
        # From 3 down to above 2, more than a place can weigh: the lesser of both is the weight, or 0.
        self.newest_first = nn.Buffer(3 - torch.arange(config.window) / config.window)
        weights = place_weights(config.repeats, config.repeat_decay)[:, None] * rank_weights(spec.top_k)
        of_slots = weights.expand(spec.num_layers, ORDERS, -1, -1)
        self.weights = nn.Buffer(of_slots.flatten(1, 2).contiguous())  # L 2*J K
        order = torch.arange(ORDERS).repeat_interleave(config.repeats * spec.top_k) * spec.num_layers
        first = (torch.arange(spec.num_layers)[:, None] + order) * spec.num_experts
        self.first = nn.Buffer(first)  # L 2*J*K
        token = predictor.token_trunk.weight[:, : config.token_width]
        repeats = predictor.earlier_trunk.weight[:, config.earlier_width * len(config.decays) :]
        self.trunk = nn.Buffer(torch.cat([token, repeats], 1).detach())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: the tensors of the state it reads, then token_id [B]. Returns the token's tensors."""
        return self.rounded(*self.exact(*inputs))

    def rounded(self, start: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The token's tensors as they are passed on."""
        ours = list(others)
        if self.predictor.reads_ids:
            repeats, usual, *ours = others
            ours = [(repeats + 0.5).to(torch.uint8), usual.half(), *ours]
        if self.predictor.config.similar:
            ours[-1] = ours[-1].to(torch.uint8)
        return start.half(), *ours

    def exact(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As `forward`, but nothing is rounded."""
        context, *window, token_id = inputs
        context = context.float()
        predictor, spec = self.predictor, self.predictor.spec
        if not predictor.reads_ids:
            return (context, *(alike(past, None, predictor.config.window) for past in window))
        number = _number(token_id)
        known = number > 0
        ids, routed, *past = window
        wanted = torch.where(known, number, LIKE_NONE)
        numbers = ids.abs()
        same = torch.cat([numbers, ids], 1) == wanted[:, None, None]  # B 2 T
        repeats = self.repeats(routed, same)
        token = self.token(number, numbers[:, 0, 0])
        told = torch.cat([token, predictor.earlier(repeats).flatten(1)], 1)
        start = torch.addmm(context, told, self.trunk.T)
        maps = repeats.unflatten(2, (spec.num_layers, spec.num_experts))
        usual = predictor.usual(token).view(-1, 1, spec.num_layers, spec.num_experts)
        in_common = (alike(count, same, predictor.config.window) for count in past)
        return start, maps.sqrt() * PER_WEIGHT, usual, self.calibration.first_row(known), *in_common

    def token(self, number: Int32[Tensor, "B"], before: Int32[Tensor, "B"]) -> Float[Tensor, "B C"]:
        """The embedding of an id, and of the pair it makes with the newest one of the window."""
        last = len(self.row_of_id) - 1
        row_of_id = self.row_of_id.int()
        row = row_of_id.index_select(0, number.clamp(max=last))
        of_before = (row_of_id * self.key_step).index_select(0, before.clamp(max=last))
        key = row + of_before
        pair = self.pair_at.index_select(0, key % PAIR_SLOTS)
        pair = torch.where(self.pair_key.index_select(0, pair) == key, pair, 0)
        table = self.predictor.tokens.weight
        return table.index_select(0, row) + table.index_select(0, pair)

    def repeats(
        self, routed: Int[Tensor, "B L T*K"], same: Bool[Tensor, "B 2 T"]
    ) -> Float[Tensor, "B 2 L*E"]:
        """`training.repeats` of the window's tokens that are the same."""
        spec = self.predictor.spec
        newest, place = torch.where(same, self.newest_first, 0.0).topk(self.predictor.config.repeats)
        slots = ORDERS * self.predictor.config.repeats
        target = at_places(routed, place, spec.top_k).long() + self.first  # B L 2*J*K
        weights = torch.minimum(newest.view(-1, 1, slots, 1), self.weights)
        empty = weights.new_zeros((same.shape[0], ORDERS * spec.num_layers * spec.num_experts))
        spread = empty.scatter_add(1, target.flatten(1), weights.flatten(1))
        return spread.unflatten(1, (ORDERS, -1))


class Advance(nn.Module):
    """The state after one finished token: averages take in its routing, the window moves on by one token."""

    def __init__(self, predictor: PrefixPredictor) -> None:
        super().__init__()
        self.predictor = predictor
        config, spec = predictor.config, predictor.spec
        decays = torch.tensor(config.decays[1:])[:, None]
        self.keep, self.take = nn.Buffer(decays), nn.Buffer(1 - decays)
        self.one_hot = nn.Buffer(torch.eye(spec.num_experts))
        self.ones = nn.Buffer(torch.ones(1, spec.top_k))
        trunk = [predictor.earlier_trunk.weight[:, : config.earlier_width * len(config.decays)]]
        if predictor.reads_ids:
            self.row_of_id = nn.Buffer(_row_of_id(predictor.vocabulary)[:, None])
            trunk += [predictor.token_trunk.weight[:, config.token_width :]]
            self.tokens = nn.Buffer(predictor.tokens.weight[: predictor.vocabulary.id_rows].detach().clone())
        self.trunk = nn.Buffer(torch.cat(trunk, 1).detach())
        self.preceding = Preceding(spec, config) if config.similar else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: the tensors of the state it reads, token_id, experts, and gates: which of them come first.

        Where gates are unknown, all are alike, and the order stays: routers mostly tell the strongest first.
        """
        averages, *window, token_id, experts, gates = inputs
        spec = self.predictor.spec
        shape = averages.shape[-2:]
        by_slot = functional.embedding(experts.mT, self.one_hot)  # B K L E
        weighed = by_slot * (shares(gates).mT * spec.top_k)[..., None]
        routed = self.ones @ weighed.flatten(2)  # a sum, cheaper so
        averages = self.keep * averages.float().flatten(2) + self.take * routed
        told = [self.predictor.earlier(torch.cat([routed, averages], 1)).flatten(1)]
        if self.predictor.reads_ids:
            ids, *window = window
            ids, tokens = self._ids_moved_on(ids, _number(token_id))
            told += [tokens]
        if window:
            routed_before, *looked_at = window
            leaving = experts.shape[2]
            newest = experts.gather(2, falling(gates))
            window = [torch.cat([newest.to(routed_before.dtype), routed_before[:, :, :-leaving]], 2)]
        if self.preceding is not None:
            past, preceding = looked_at
            window += [(past + 1).clamp(max=self.predictor.config.window)]
            window += [self.preceding(preceding, routed_before, past, experts)]
        if self.predictor.reads_ids:
            window = [ids, *window]
        in_bytes = (routed.sqrt() * per_root(spec) + 0.5).to(torch.uint8)
        maps = in_bytes.unflatten(2, shape), averages.unflatten(2, shape).half()
        return ((torch.cat(told, 1) @ self.trunk.T).half(), *maps, *window)

    def _ids_moved_on(
        self, ids: Int32[Tensor, "B 1 T"], number: Int32[Tensor, "B"]
    ) -> tuple[Int32[Tensor, "B 1 T"], Float[Tensor, "B R*C"]]:
        """The window's next ids, and the embeddings of its newest tokens."""
        earlier, newest = ids.abs(), number[:, None, None]
        before = torch.cat([newest, earlier[:, :, :-1]], 2)
        # The token before the one at a place was, a token ago, at the same place.
        follows = earlier == torch.where(newest > 0, newest, LIKE_NONE)
        recent = before[:, 0, : self.predictor.config.recent_tokens].clamp(max=len(self.row_of_id) - 1)
        rows = functional.embedding(recent, self.row_of_id.int())  # B R 1
        tokens = functional.embedding(rows, self.tokens)
        return torch.where(follows, before, -before), tokens.flatten(1)


def _number(token_id: Int64[Tensor, "B"]) -> Int32[Tensor, "B"]:
    """The id + 1, 0 where unknown."""
    return token_id.clamp(-1, LARGEST_ID).int() + 1


def _row_of_id(vocabulary: Vocabulary) -> Int[Tensor, "V"]:
    """Row of each id, shifted by one so that -1 comes first; ids past the end share the row of the last.

    In 16 bits, where that is enough: there are as many ids as the tokenizer has.
    """
    largest = int(vocabulary.known[-1]) + 1 if len(vocabulary.known) else 0
    small = np.int16 if vocabulary.id_rows <= MOST_ROWS else np.int32
    return torch.from_numpy(vocabulary.rows(np.arange(-1, largest + 1)).astype(small))


def _pairs(vocabulary: Vocabulary) -> tuple[Int32[Tensor, "S"], Int32[Tensor, "V"]]:
    """By slot, the row of the pair whose key falls on it, else 0; by row, the pair's key, else -1."""
    keys = vocabulary.pair_keys(vocabulary.pairs[:, 1], vocabulary.pairs[:, 0])
    rows = vocabulary.pair_rows(vocabulary.pairs[:, 1], vocabulary.pairs[:, 0])
    at, key = np.full(PAIR_SLOTS, UNKNOWN_ROW, np.int32), np.full(vocabulary.num_rows, -1, np.int32)
    at[keys % PAIR_SLOTS] = rows
    key[rows] = keys
    return torch.from_numpy(at), torch.from_numpy(key)
