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

import torch
from jaxtyping import Float, Float16, Int32, UInt8
from torch import Tensor, nn
from torch.nn import functional

from model_store.manifest import ADVANCE, BEGIN, PREDICT, STEP
from training.calibration import Calibration
from training.operators import rows_at, shares, sum_of_rows
from training.predictors.prefix import PrefixPredictor, ahead
from training.predictors.prefix_past_graphs import PER_WEIGHT, Advance, Begin, per_root
from training.predictors.similar_graphs import Similar
from training.repeats import ORDERS
from training.served import Served, tensor

# Expert ids below it fit into a byte.
BYTE_VALUES = 256


def served(predictor: PrefixPredictor, calibration: Calibration) -> Served:
    """The four functions of a trained predictor, and what they pass on.

    What is passed on is kept small: ten thousand sequences should fit into 500 MB.
    state: context, what the past adds to x; previous, roots of the average of decay 0, which is the last
    token's map, in bytes; averages, the others, in half precision; ids of the window's tokens, newest first,
    + 1, 0 where unknown, negative but for those that came after the same id as the next token does; routed,
    their experts by falling gate;
    past, how many tokens of the window there are; preceding, how many experts the tokens before each of them
    share with those before the next token, on average.
    token: start, what past and id add to x; repeats, roots of their maps; usual, the map of what is usual for
    the token; first_row, of the calibration tables; alike, what each token of the window has in common with
    this one (`training.similar`).
    progress: seen, the number of the last layer + 1; told, what the layers seen add to x, and their map;
    shared, how many experts each token of the window shares, in all and lately.
    """
    spec, config = predictor.spec, predictor.config
    layers, experts = spec.num_layers, spec.num_experts
    state = [tensor("context", "float16", config.width)]
    state += [tensor("previous", "uint8", 1, layers, experts)]
    state += [tensor("averages", "float16", len(config.decays) - 1, layers, experts)]
    token = [tensor("start", "float16", config.width)]
    progress = [tensor("seen", "int32"), tensor("told", "float16", 2 * config.width + layers * experts)]
    if predictor.reads_ids:
        state += [tensor("ids", "int32", 1, config.window)]
    if predictor.reads_ids or config.similar:
        small = "uint8" if experts <= BYTE_VALUES else "int32"
        state += [tensor("routed", small, layers, config.window * spec.top_k)]
    if predictor.reads_ids:
        token += [tensor("repeats", "uint8", ORDERS, layers, experts)]
        token += [tensor("usual", "float16", 1, layers, experts), tensor("first_row", "int32")]
    if config.similar:
        state += [tensor("past", "int32")]
        state += [tensor("preceding", "float32", len(config.preceding_decays), config.window)]
        token += [tensor("alike", "uint8", config.window)]
        progress += [tensor("shared", "float32", 2, config.window)]
    remembered = tuple(t.name for t in state[3:])
    of_window = remembered[:-1] if config.similar else remembered
    begin, step = Begin(predictor, calibration), Step(predictor, calibration)
    return Served(
        graphs={PREDICT: Predict(begin, step), ADVANCE: Advance(predictor), BEGIN: begin, STEP: step},
        reads={
            PREDICT: ("context", "previous", "averages", *remembered),
            ADVANCE: ("averages", *remembered),
            BEGIN: ("context", *(of_window if predictor.reads_ids else of_window[1:])),
            STEP: ("previous", "averages", *(["routed", "preceding"] if config.similar else [])),
        },
        state=tuple(state),
        token=tuple(token),
        progress=tuple(progress),
    )


class Step(nn.Module):
    """What the layers seen add to x, and from x calibrated probabilities of every layer.

    Of x = ... + sum_l a_l + F sum_l fade^(last - l) a_l, `told` holds both sums, and after them the map of
    what the layers seen say of those to come. Within a step, the second sum is as if the middle layer were
    the last one: times fade^(last - middle), it is right for whichever layer is. Half precision has no room
    for that.
    """

    def __init__(self, predictor: PrefixPredictor, calibration: Calibration) -> None:
        super().__init__()
        self.predictor, self.calibration = predictor, calibration
        spec, decay = predictor.spec, predictor.config.layer_decay
        middle = spec.num_layers / 2
        self.rise = nn.Buffer(decay ** (middle - torch.arange(spec.num_layers)))
        self.fade = nn.Buffer(decay ** (torch.arange(spec.num_layers + 1)[:, None] - 1 - middle))
        routing = predictor.routing.weight.detach().view(-1, spec.num_layers, 2, spec.num_experts)
        # As predict multiplies by them, so that both are in the same 8 bits.
        self.routing = nn.Buffer(routing.transpose(1, 2).flatten(1).contiguous())  # D 2*L*E
        self.fading = nn.Buffer(predictor.fading.weight.detach().clone())
        self.of_share = nn.Buffer(torch.tensor([[1.0, -1.0], [0.0, spec.top_k]]))
        first = 1 + torch.arange(-1, spec.num_layers).clamp(min=0) * spec.num_experts
        self.layer_row = nn.Buffer(first[:, None].repeat(1, spec.top_k).int())  # by layers seen
        self.ones = nn.Buffer(torch.ones(1, predictor.maps))
        units = torch.ones(predictor.maps)
        units[0] = 1 / per_root(spec)
        earlier = len(predictor.config.decays)
        if predictor.reads_ids:
            units[earlier : earlier + ORDERS] = 1 / PER_WEIGHT
        self.unit = nn.Buffer(units.repeat_interleave(spec.num_layers))
        self.similar: Similar | None = None
        if predictor.likeness is not None:
            weights, ranks = predictor.likeness.weight, predictor.counted_ranks()
            self.similar = Similar(spec, predictor.config, weights, ranks, self.rise, self.fade)

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
            routed, preceding, *token, in_common, seen, told, shared = others
            rows = rows_at(routed, layers.clamp(min=0).long())
            shared = shared + self.similar.counted(rows, layers, experts)
            similar = [routed, in_common, preceding, shared]
        last, sums = self.sums(layers, experts, gates)
        faded = self.faded()
        told = told.float() * (1 / faded).index_select(0, seen) + sums
        seen = torch.maximum(seen, last)
        told = told * faded.index_select(0, seen)
        logits, row = self.logits(previous, averages, token, seen, self.parts(told), similar)
        return seen, told.half(), *similar[3:], self.calibration(logits, row)

    def faded(self) -> Float[Tensor, "L+1 2*D+L*E"]:
        """By layers seen, what the sums of a step are multiplied by to be what `told` holds."""
        width, spec = self.predictor.config.width, self.predictor.spec
        one = torch.ones_like(self.fade)
        fading, map_ = self.fade.expand(-1, width), one.expand(-1, spec.num_layers * spec.num_experts)
        return torch.cat([one.expand(-1, width), fading, map_], 1)

    def parts(self, told: Float[Tensor, "B 2*D+L*E"]) -> list[Tensor]:
        """The sum of what the layers seen add to x, the one that fades, and their map."""
        width, spec = self.predictor.config.width, self.predictor.spec
        return list(told.split([width, width, spec.num_layers * spec.num_experts], 1))

    def sums(
        self, layers: Int32[Tensor, "B M"], experts: Int32[Tensor, "B M K"], gates: Float[Tensor, "B M K"]
    ) -> tuple[Int32[Tensor, "B"], Float[Tensor, "B 2*D+L*E"]]:
        """Of the layers told: the last one's number + 1, 0 for none, and what they add to `told`."""
        spec = self.predictor.spec
        by_expert = (-1, 2, spec.num_layers, spec.num_experts)
        plain, rising = (
            self.of_share @ table.view(by_expert).permute(2, 3, 1, 0)  # L E 2 D
            for table in (self.routing, self.fading @ self.routing)
        )
        rising = rising * self.rise[:, None, None, None]
        pairs = ahead(self.predictor.pairs.permute(2, 1, 0, 3), spec)  # E 2 L L*E
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
        told: list[Tensor],
        similar: list[Tensor],
    ) -> tuple[Float[Tensor, "B L E"], Int32[Tensor, "B"]]:
        """(logits of every layer, the rows of the calibration tables that go with them).

        token: the token's tensors, but for what the window has in common with it. told: as `parts` has it.
        similar: the window's routing, what it has in common, and how many experts its preceding tokens and
        itself share; nothing where nobody looks.
        """
        start, *ours = token
        predictor, spec = self.predictor, self.predictor.spec
        plain, rising, pairs = told
        start = start.float() + predictor.last_seen.weight.index_select(0, seen)
        x = start + plain + rising
        y = predictor.norm(predictor.blocks(x))
        row = seen
        maps = [previous.float(), averages.float().sqrt()]  # of `previous`, roots are kept
        if predictor.reads_ids:
            repeats, usual, first_row = ours
            maps, row = [*maps, repeats.float(), usual.float()], seen + first_row
        maps += [pairs.view(-1, 1, spec.num_layers, spec.num_experts)]
        if self.similar is not None:
            routed, in_common, preceding, shared = similar
            maps += [self.similar.routing(routed, in_common, preceding, shared, seen).sqrt()]
        counts = predictor.counts
        said = functional.linear(y, counts.weight * self.unit[:, None], counts.bias * self.unit)
        shares_of_maps = said.view(-1, predictor.maps, spec.num_layers, 1)
        copied = self.ones @ (shares_of_maps * torch.cat(maps, 1)).flatten(2)  # a sum, cheaper so
        return (predictor.head(y)[:, None] + copied).view(-1, spec.num_layers, spec.num_experts), row


class Predict(nn.Module):
    """Calibrated probabilities of every layer from the state, the token id and the layers seen so far."""

    def __init__(self, begin: Begin, step: Step) -> None:
        super().__init__()
        self.begin, self.step = begin, step
        spec = step.predictor.spec
        layers, experts = spec.num_layers, spec.num_experts
        layer_number = torch.arange(layers, dtype=torch.int32)
        self.layer_number = nn.Buffer(layer_number)
        kind = torch.arange(2)  # routed or not, and by how much
        first = (kind * layers + layer_number.long()[:, None]) * experts
        self.first_expert = nn.Buffer(first[:, None])  # L 1 2
        self.first_row = nn.Buffer(layer_number[:, None] * experts)
        rising = step.rise.repeat_interleave(experts).repeat(2)
        self.counts = nn.Buffer(torch.stack([torch.ones_like(rising), rising]))  # in either sum
        # Of each layer, where those before it tell of it, and which of them there are.
        reach = step.predictor.pairs.shape[-1] // experts
        before = layer_number.long()[:, None] - 1 - torch.arange(reach)
        row = before * reach + torch.arange(reach)
        self.told_at = nn.Buffer(row.clamp(min=0).flatten())
        self.there = nn.Buffer((before >= 0).float()[:, None])  # L 1 R

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B L E"]:
        """inputs: the state's tensors, then token_id [B], experts [B, L, K], gates [B, L, K]."""
        return self.step.calibration(*self.logits(*inputs))

    def logits(
        self, *inputs: Tensor, further: Float[Tensor, "B D"] | None = None
    ) -> tuple[Float[Tensor, "B L E"], Int32[Tensor, "B"]]:
        """As `Step.logits`. further: what else is added to x."""
        context, previous, averages, *window, token_id, experts, gates = inputs
        reads_ids, looks = self.step.predictor.reads_ids, self.step.similar
        of_window = window if looks is None else window[:-1]
        start, *ours = self.begin.exact(context, *(of_window if reads_ids else of_window[1:]), token_id)
        layers = torch.where(experts[:, :, 0] >= 0, self.layer_number, -1)
        similar: list[Tensor] = []
        if looks is not None:
            *ours, in_common = ours
            routed = window[1] if reads_ids else window[0]
            similar = [routed, in_common, window[-1], looks.counted(routed, layers, experts)]
        token = [start if further is None else start + further, *ours]
        return self.step.logits(previous, averages, token, *self.sums(layers, experts, gates), similar)

    def sums(
        self, layers: Int32[Tensor, "B L"], experts: Int32[Tensor, "B L K"], gates: Float[Tensor, "B L K"]
    ) -> tuple[Int32[Tensor, "B"], list[Tensor]]:
        """As `Step.sums`, in parts. Of all layers, products read less than rows of `Step` would."""
        step, spec = self.step, self.step.predictor.spec
        known = (weights_of(gates) @ step.of_share) * (experts >= 0)[..., None]  # B L K 2
        at = self.first_expert + experts.clamp(min=0)[..., None]
        empty = known.new_zeros((known.shape[0], 2 * spec.num_layers * spec.num_experts))
        routing = empty.scatter_add(1, at.flatten(1), known.flatten(1))
        plain, rising = functional.linear(routing[:, None] * self.counts, step.routing).unbind(1)
        seen = (layers + 1).amax(1)
        rising = functional.linear(rising, step.fading) * step.fade.index_select(0, seen)
        return seen, [plain, rising, self.pairs(experts, known)]

    def pairs(
        self, experts: Int32[Tensor, "B L K"], known: Float[Tensor, "B L K 2"]
    ) -> Float[Tensor, "B L*E"]:
        """The map of what the layers seen say of those to come."""
        pairs, count = self.step.predictor.pairs, self.step.predictor.spec.num_experts
        table = pairs.transpose(1, 2).reshape(-1, 2 * pairs.shape[-1])  # L*E 2*R*E
        rows = functional.embedding(self.first_row + experts.clamp(min=0), table)
        # Sums, cheaper so: over a layer's experts, and over the layers before one.
        near = known.flatten(2)[:, :, None] @ rows.unflatten(3, (2, -1)).flatten(2, 3)  # B L 1 R*E
        told = near.reshape(-1, self.told_at.shape[0], count).index_select(1, self.told_at)
        return (self.there @ told.unflatten(1, (-1, self.there.shape[-1]))).flatten(1)


def weights_of(gates: Float[Tensor, "B M K"]) -> Float[Tensor, "B M K 2"]:
    """What an expert's two embeddings count, before `of_share`: 1, and the gate's share."""
    return functional.pad(shares(gates)[..., None], (1, 0), value=1.0)
