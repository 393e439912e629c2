"""The `prefix` predictor as it is served: four functions of a sequence, each exported as a graph.

trained `PrefixPredictor` + calibration -> served() -> advance, begin, step, predict -> `training.onnx_graph`

What the past adds to x is worked out once a token: in `Advance` what any next token would need, in `Begin`
what needs the token's id. `Step` then adds what was seen since. `Predict` is `Begin` and one `Step` of all
layers.

ONNX Runtime takes half a microsecond for an operator whatever it does. Hence tables; those that depend on
weights alone are written as ordinary operations, which it does once, when the graph is loaded, so that a file
holds no more than the weights.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int, Int32, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from model_store.manifest import ADVANCE, BEGIN, PREDICT, STEP
from training.calibration import Calibration
from training.operators import rows_at, shares, sum_of_rows
from training.predictors.prefix import PrefixPredictor, ahead
from training.predictors.similar_graphs import Similar, alike, at_places
from training.repeats import ORDERS, place_weights
from training.served import Served, tensor
from training.vocabulary import MOST_ROWS, PAIR_SLOTS, UNKNOWN_ROW, Vocabulary

# Expert ids below it fit into a byte.
BYTE_VALUES = 256
# Ids are kept + 1 in 32 bits, some of them negative: none of them is equal to LIKE_NONE.
LARGEST_ID = 2**31 - 2
LIKE_NONE = -(2**31)
# Repeats, at most 1, are kept in bytes of so many to 1: of 10,000 open sequences that saves 46 MB, and
# averages in half precision 31 MB.
PER_WEIGHT = 255


def served(predictor: PrefixPredictor, calibration: Calibration) -> Served:
    """The four functions of a trained predictor, and what they pass on.

    state: context, what the past adds to x; previous, the average of decay 0, which is the last token's map,
    in bytes; averages, the others, in half precision; ids of the window's tokens, newest first, + 1, 0 where
    unknown, negative but for those that came after the same id as the next token does; routed, their experts;
    past, how many tokens of the window there are.
    token: start, what past and id add to x; repeats, their maps; usual, the map of what is usual for the
    token; first_row, of the calibration tables; alike, what each token of the window has in common with this
    one (`training.similar`).
    progress: seen, the number of the last layer + 1; told, what the layers seen add to x, and their map;
    shared, how many experts each token of the window shares, in all and lately.
    exact: weights that keep their bits, by the ends of their names (`training.quantization`).
    """
    spec, config = predictor.spec, predictor.config
    layers, experts = spec.num_layers, spec.num_experts
    state = [tensor("context", "float32", config.width)]
    state += [tensor("previous", "uint8", 1, layers, experts)]
    state += [tensor("averages", "float16", len(config.decays) - 1, layers, experts)]
    token = [tensor("start", "float32", config.width)]
    progress = [tensor("seen", "int32"), tensor("told", "float32", 2 * config.width + layers * experts)]
    if predictor.reads_ids:
        state += [tensor("ids", "int32", 1, config.window)]
    if predictor.reads_ids or config.similar:
        small = "uint8" if experts <= BYTE_VALUES else "int32"
        state += [tensor("routed", small, layers, config.window * spec.top_k)]
    if predictor.reads_ids:
        token += [tensor("repeats", "uint8", ORDERS, layers, experts)]
        token += [tensor("usual", "float32", 1, layers, experts), tensor("first_row", "int32")]
    if config.similar:
        state += [tensor("past", "int32")]
        token += [tensor("alike", "uint8", config.window)]
        progress += [tensor("shared", "float32", 2, config.window)]
    remembered = tuple(t.name for t in state[3:])
    begin, step = Begin(predictor, calibration), Step(predictor, calibration)
    return Served(
        graphs={PREDICT: Predict(begin, step), ADVANCE: Advance(predictor), BEGIN: begin, STEP: step},
        reads={
            PREDICT: ("context", "previous", "averages", *remembered),
            ADVANCE: ("averages", *remembered),
            BEGIN: ("context", *(remembered if predictor.reads_ids else remembered[1:])),
            STEP: ("previous", "averages", *(["routed"] if config.similar else [])),
        },
        state=tuple(state),
        token=tuple(token),
        progress=tuple(progress),
        exact=("fading",),  # step multiplies its table by it when it is loaded, predict what it adds up
    )


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
        # From 2 down to above 1, more than a place can weigh: the lesser of both is the weight, or 0.
        self.newest_first = nn.Buffer(2 - torch.arange(config.window) / config.window)
        weights = place_weights(config.repeats, config.repeat_decay)
        of_slots = weights[:, None].expand(ORDERS, spec.num_layers, -1, -1).transpose(0, 1).flatten(1, 2)
        self.weights = nn.Buffer(of_slots.repeat(1, 1, spec.top_k))  # L 2*J K
        order = torch.arange(ORDERS).repeat_interleave(config.repeats * spec.top_k) * spec.num_layers
        first = (torch.arange(spec.num_layers)[:, None] + order) * spec.num_experts
        self.first = nn.Buffer(first)  # L 2*J*K
        token = predictor.token_trunk.weight[:, : config.token_width]
        repeats = predictor.earlier_trunk.weight[:, config.earlier_width * len(config.decays) :]
        self.trunk = nn.Buffer(torch.cat([token, repeats], 1).detach())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: the tensors of the state it reads, then token_id [B]. Returns the token's tensors."""
        context, *window, token_id = inputs
        predictor, spec = self.predictor, self.predictor.spec
        if not predictor.reads_ids:
            return (context.clone(), *(alike(past, None, predictor.config.window) for past in window))
        number = _number(token_id)
        known = number > 0
        ids, routed, *counts = window
        wanted = torch.where(known, number, LIKE_NONE)
        same = torch.cat([ids.abs(), ids], 1) == wanted[:, None, None]  # B 2 T
        repeats = self.repeats(routed, same)
        token = self.token(number, ids)
        told = torch.cat([token, predictor.earlier(repeats).flatten(1)], 1)
        start = torch.addmm(context, told, self.trunk.T)
        maps = repeats.unflatten(2, (spec.num_layers, spec.num_experts))
        in_bytes = (maps * PER_WEIGHT + 0.5).to(torch.uint8)
        usual = predictor.usual(token).view(-1, 1, spec.num_layers, spec.num_experts)
        in_common = (alike(past, same, predictor.config.window) for past in counts)
        return start, in_bytes, usual, self.calibration.first_row(known), *in_common

    def token(self, number: Int32[Tensor, "B"], ids: Int32[Tensor, "B 1 T"]) -> Float[Tensor, "B C"]:
        """The embedding of an id, and of the pair it makes with the newest one of the window."""
        last, before = len(self.row_of_id) - 1, ids[:, 0, 0].abs()
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
        target = at_places(routed, place.flatten(1), spec.top_k).long() + self.first  # B L 2*J*K
        weights = torch.minimum(newest.flatten(1)[:, None, :, None], self.weights)
        empty = weights.new_zeros((same.shape[0], ORDERS * spec.num_layers * spec.num_experts))
        spread = empty.scatter_add(1, target.flatten(1), weights.flatten(1))
        return spread.unflatten(1, (ORDERS, -1))


class Step(nn.Module):
    """What the layers seen add to x, and from x calibrated probabilities of every layer.

    Of x = ... + sum_l a_l + F sum_l fade^(last - l) a_l, `told` holds the first sum, and the second as if the
    middle layer were the last one. Times fade^(last - middle), it is right for whichever layer is. After them
    comes the map of what the layers seen say of those to come.
    """

    def __init__(self, predictor: PrefixPredictor, calibration: Calibration) -> None:
        super().__init__()
        self.predictor, self.calibration = predictor, calibration
        spec, decay = predictor.spec, predictor.config.layer_decay
        middle = spec.num_layers / 2
        self.rise = nn.Buffer(decay ** (middle - torch.arange(spec.num_layers)))
        self.fade = nn.Buffer(decay ** (torch.arange(spec.num_layers + 1)[:, None] - 1 - middle))
        routing = predictor.routing.weight.detach().view(-1, spec.num_layers, 2, spec.num_experts)
        self.routing = nn.Buffer(routing.permute(1, 3, 2, 0).contiguous())  # L E 2 D
        self.fading = nn.Buffer(predictor.fading.weight.detach().T.contiguous())
        self.of_share = nn.Buffer(torch.tensor([[1.0, -1.0], [0.0, spec.top_k]]))
        first = 1 + torch.arange(-1, spec.num_layers).clamp(min=0) * spec.num_experts
        self.layer_row = nn.Buffer(first[:, None].repeat(1, spec.top_k).int())  # by layers seen
        self.ones = nn.Buffer(torch.ones(1, predictor.maps))
        units = torch.ones(predictor.maps)
        earlier = len(predictor.config.decays)
        if predictor.reads_ids:
            units[earlier : earlier + ORDERS] = 1 / PER_WEIGHT
        self.unit = nn.Buffer(units.repeat_interleave(spec.num_layers))
        self.similar: Similar | None = None
        if predictor.likeness is not None:
            weights = predictor.likeness.weight
            self.similar = Similar(spec, predictor.config, weights, self.rise, self.fade)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: previous, averages, routed if similar tokens are looked for, the token's tensors, progress,
        layers [B, M], experts [B, M, K], gates.

        Returns the next progress and the probabilities.
        """
        previous, averages, *others, layers, experts, gates = inputs
        similar: list[Tensor] = []
        if self.similar is None:
            *token, seen, told = others
        else:
            routed, *token, in_common, seen, told, shared = others
            rows = rows_at(routed, layers.clamp(min=0).long())
            similar = [routed, in_common, shared + self.similar.counted(rows, layers, experts)]
        last, sums = self.sums(layers, experts, gates)
        seen, told = torch.maximum(seen, last), told + sums
        logits, row = self.logits(previous, averages, token, seen, told, similar)
        return seen, told, *similar[2:], self.calibration(logits, row)

    def sums(
        self, layers: Int32[Tensor, "B M"], experts: Int32[Tensor, "B M K"], gates: Float[Tensor, "B M K"]
    ) -> tuple[Int32[Tensor, "B"], Float[Tensor, "B 2*D+L*E"]]:
        """Of the layers told: the last one's number + 1, 0 for none, and what they add to `told`."""
        plain = self.of_share @ self.routing
        rising = plain @ self.fading * self.rise[:, None, None, None]
        pairs = ahead(self.predictor.pairs.permute(2, 1, 0, 3), self.predictor.spec)  # E 2 L L*E
        embeddings = [plain, rising, self.of_share @ pairs.permute(2, 0, 1, 3)]
        rows = self.rows(torch.cat(embeddings, -1), layers, experts)
        return (layers + 1).amax(1), sum_of_rows(weights_of(gates), rows)

    def rows(
        self,
        embeddings: Float[Tensor, "L E 2 C"],
        layers: Int32[Tensor, "B M"],
        experts: Int32[Tensor, "B M K"],
    ) -> Float[Tensor, "B M K 2*C"]:
        """The embeddings of these experts, for being routed and times its gate's share s; 0 for layer -1.

        A gate counts by its offset from an equal share, K s - 1: so does `of_share`.
        """
        table = functional.pad(embeddings.flatten(2).flatten(0, 1), (0, 0, 1, 0))
        return functional.embedding(functional.embedding(layers + 1, self.layer_row) + experts, table)

    def logits(
        self,
        previous: UInt8[Tensor, "B 1 L E"],
        averages: Float16[Tensor, "B S L E"],
        token: list[Tensor],
        seen: Int32[Tensor, "B"],
        told: Float[Tensor, "B 2*D+L*E"],
        similar: list[Tensor],
    ) -> tuple[Float[Tensor, "B L E"], Int32[Tensor, "B"]]:
        """(logits of every layer, the rows of the calibration tables that go with them).

        token: the token's tensors, but for what the window has in common with it. similar: the window's
        routing, what it has in common, and how many experts it shares; nothing where nobody looks.
        """
        start, *ours = token
        predictor, spec = self.predictor, self.predictor.spec
        width = predictor.config.width
        plain, rising, pairs = told.split([width, width, spec.num_layers * spec.num_experts], 1)
        start = start + predictor.last_seen.weight.index_select(0, seen)
        x = start + plain + rising * self.fade.index_select(0, seen)
        y = predictor.norm(predictor.blocks(x))
        row = seen
        maps = [previous.float(), averages.float()]
        if predictor.reads_ids:
            repeats, usual, first_row = ours
            maps, row = [*maps, repeats.float(), usual], seen + first_row
        maps += [pairs.view(-1, 1, spec.num_layers, spec.num_experts)]
        if self.similar is not None:
            routed, in_common, shared = similar
            maps += [self.similar.routing(routed, in_common, shared, seen)]
        copy = predictor.copy
        said = functional.linear(y, copy.weight * self.unit[:, None], copy.bias * self.unit)
        shares_of_maps = said.view(-1, predictor.maps, spec.num_layers, 1)
        copied = self.ones @ (shares_of_maps * torch.cat(maps, 1)).flatten(2)  # a sum, cheaper so
        return (predictor.head(y)[:, None] + copied).view(-1, spec.num_layers, spec.num_experts), row


class Predict(nn.Module):
    """Calibrated probabilities of every layer from the state, the token id and the layers seen so far."""

    def __init__(self, begin: Begin, step: Step) -> None:
        super().__init__()
        self.begin, self.step = begin, step
        spec = step.predictor.spec
        self.layer_number = nn.Buffer(torch.arange(spec.num_layers, dtype=torch.int32))
        first = torch.arange(2 * spec.num_layers).view(-1, 1, 2) * spec.num_experts
        self.first_expert = nn.Buffer(first)  # of a layer, routed or not, then by how much
        self.ones = nn.Buffer(torch.ones(1, spec.num_layers))

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B L E"]:
        """inputs: the state's tensors, then token_id [B], experts [B, L, K], gates [B, L, K]."""
        return self.step.calibration(*self.logits(*inputs))

    def logits(
        self, *inputs: Tensor, further: Float[Tensor, "B D"] | None = None
    ) -> tuple[Float[Tensor, "B L E"], Int32[Tensor, "B"]]:
        """As `Step.logits`. further: what else is added to x."""
        context, previous, averages, *window, token_id, experts, gates = inputs
        reads_ids, looks = self.step.predictor.reads_ids, self.step.similar
        start, *ours = self.begin(context, *(window if reads_ids else window[1:]), token_id)
        layers = torch.where(experts[:, :, 0] >= 0, self.layer_number, -1)
        similar: list[Tensor] = []
        if looks is not None:
            *ours, in_common = ours
            routed = window[reads_ids]
            similar = [routed, in_common, looks.counted(routed, layers, experts)]
        token = [start if further is None else start + further, *ours]
        return self.step.logits(previous, averages, token, *self.sums(layers, experts, gates), similar)

    def sums(
        self, layers: Int32[Tensor, "B L"], experts: Int32[Tensor, "B L K"], gates: Float[Tensor, "B L K"]
    ) -> tuple[Int32[Tensor, "B"], Float[Tensor, "B 2*D+L*E"]]:
        """As `Step.sums`. Of all layers, reading less is worth a few operators more: no rows that rise, and
        products instead of rows of pairs."""
        step, weights = self.step, weights_of(gates)
        rows = step.rows(step.of_share @ step.routing, layers, experts)
        rising = sum_of_rows(weights * step.rise[:, None, None], rows) @ step.fading
        told = [sum_of_rows(weights, rows), rising, self.pairs(experts, weights)]
        return (layers + 1).amax(1), torch.cat(told, 1)

    def pairs(
        self, experts: Int32[Tensor, "B L K"], weights: Float[Tensor, "B L K 2"]
    ) -> Float[Tensor, "B L*E"]:
        """The map of what the layers seen say of those to come."""
        step, spec = self.step, self.step.predictor.spec
        known = (weights @ step.of_share) * (experts >= 0)[..., None]  # B L K 2
        at = self.first_expert + experts.clamp(min=0)[..., None]
        empty = known.new_zeros((known.shape[0], 2 * spec.num_layers * spec.num_experts))
        routing = empty.scatter_add(1, at.flatten(1), known.flatten(1))
        by_layer = routing.view(-1, spec.num_layers, 2 * spec.num_experts).transpose(0, 1)
        near = (by_layer @ step.predictor.pairs.flatten(1, 2)).transpose(0, 1)  # B L R*E
        return (self.ones @ ahead(near, spec)).flatten(1)  # a sum, cheaper so


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

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: the tensors of the state it reads, token_id, experts, and gates, of no use to it."""
        averages, *window, token_id, experts, _ = inputs
        shape = averages.shape[-2:]
        by_slot = functional.embedding(experts.mT, self.one_hot).flatten(2)  # B K L*E
        routed = self.ones @ by_slot  # a sum, cheaper so
        averages = self.keep * averages.float().flatten(2) + self.take * routed
        told = [self.predictor.earlier(torch.cat([routed, averages], 1)).flatten(1)]
        if self.predictor.reads_ids:
            ids, *window = window
            ids, tokens = self._ids_moved_on(ids, _number(token_id))
            told += [tokens]
        if window:
            routed_before, *counts = window
            newest, leaving = experts.to(routed_before.dtype), experts.shape[2]
            window = [torch.cat([newest, routed_before[:, :, :-leaving]], 2)]
            window += [(past + 1).clamp(max=self.predictor.config.window) for past in counts]
        if self.predictor.reads_ids:
            window = [ids, *window]
        maps = routed.to(torch.uint8).unflatten(2, shape), averages.unflatten(2, shape).half()
        return (torch.cat(told, 1) @ self.trunk.T, *maps, *window)

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


def weights_of(gates: Float[Tensor, "B M K"]) -> Float[Tensor, "B M K 2"]:
    """What the rows of `Step.embeddings` count: 1, and the gate's share."""
    return functional.pad(shares(gates)[..., None], (1, 0), value=1.0)


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
