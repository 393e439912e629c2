"""The `prefix` predictor: what was seen is summed up, looked at once, and answered for all layers at once.

Comes after `dataset`, before `loop` and `export`. The routed experts of the layers seen so far, each an
embedding that its gate shifts, are added up twice: all layers alike, and fading with their distance from the
last one. Earlier routing comes in as Q dense maps [L, E]: averages of past tokens at several time scales, and
of the earlier places of this very token (`training.repeats`). The maps take two ways. Into the trunk, by an
embedding they share; and past it, straight to the logits, the root of each layer of each map times a number
that the trunk says. Two maps more take the second way alone, as they are. One is what is usual for a token,
which is learnt, from its id and from the pair it makes with the token before it. The other is what the layers
seen say of the next R layers: a number for every pair of an expert seen and an expert of one of those. Where
asked for, there is a third, of which the root counts, too: the routing of the tokens that were routed most
like this one so far (`training.similar`).

    t = T[id] + T[pair]
    a_l = sum_k A[l, e_k] + offset(gate_k) A'[l, e_k]            l: a layer seen
    x = sum_l a_l + F sum_l fade^(last - l) a_l + sum_q M_q (M map_q) + C [t, T[ids before]] + d[last]
    y = norm(blocks(x))
    z[l, e] = head(y)[l, e] + sum_q counts(y)[q, l] past_q[l, e]  past_q = root map_q; U t; sum_l P_l

P_l is as a_l, of R E numbers an expert, at the layers l + 1 .. l + R. A trunk of a few hundred numbers cannot
carry which of 768 experts were routed to; the second way need not squeeze them through. What is served is the
same, taken apart into steps (`training.predictors.prefix_graphs`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from traces.spec import RoutingSpec
from training.config import PrefixConfig
from training.dataset import Batch
from training.dropout import dropout
from training.errors import ConfigInvalid
from training.loss import NEAREST
from training.predictors.predictor import Predictor
from training.repeats import ORDERS, rank_weights
from training.similar import PRESENT, MostSimilar, beginning, scores, shared
from training.vocabulary import Vocabulary

# A token seen only a few times should say little, not something at random.
SMALL = 0.02
# A served step keeps sums that fade by up to decay^(L / 2) either way; floats end at 1e-38.
SMALLEST_FADE = 1e-30
# What each earlier map counts in the logits before anything is learnt.
COUNTS = 0.3
COUNTS_LEARNT = 1.0


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


class PrefixPredictor(Predictor):
    """The trainable form: dense inputs, several prefixes of the same token at once.

    spec, config, vocabulary: what it is for; kept for export. Without a vocabulary, repeats are not used.
    """

    has_next = True

    def __init__(self, spec: RoutingSpec, config: PrefixConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if config.layer_decay ** (spec.num_layers / 2) < SMALLEST_FADE:
            raise ConfigInvalid(
                f"layer_decay is {config.layer_decay}, too small for floats with {spec.num_layers} layers.",
                remedy="Set --layer-decay nearer to 1.",
            )
        self.spec, self.config, self.vocabulary = spec, config, vocabulary
        self.reads_ids = bool(len(vocabulary.known))
        outputs, width = spec.num_layers * spec.num_experts, config.width
        earlier_maps = len(config.decays) + (ORDERS if self.reads_ids else 0)
        # Those that differ by the layers seen come last.
        self.further = 1 + bool(config.similar)
        self.maps = earlier_maps + self.reads_ids + self.further
        self.routing = nn.Linear(2 * outputs, width, bias=False)  # routed or not, and by how much
        self.reach = min(config.reach, spec.num_layers)
        self.pairs = nn.Parameter(
            torch.empty(spec.num_layers, 2, spec.num_experts, self.reach * spec.num_experts)
        )
        begun = beginning(len(config.preceding_decays))
        self.likeness = nn.Embedding(spec.num_layers + 1, len(begun)) if config.similar else None
        self.fading = nn.Linear(width, width, bias=False)
        self.earlier = nn.Linear(outputs, config.earlier_width, bias=False)
        self.earlier_trunk = nn.Linear(config.earlier_width * earlier_maps, width, bias=False)
        self.last_seen = nn.Embedding(spec.num_layers + 1, width)
        self.layer_weights = nn.Buffer(layer_weights(spec.num_layers, config.layer_decay), persistent=False)
        self.tokens = nn.Embedding(vocabulary.num_rows, config.token_width, padding_idx=0)
        self.usual = nn.Linear(config.token_width, outputs, bias=False)
        self.token_trunk = nn.Linear(config.token_width * (config.recent_tokens + 1), width, bias=False)
        self.blocks = nn.Sequential(
            *(Residual(width, config.hidden, config.dropout) for _ in range(config.blocks))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self.counts = nn.Linear(width, self.maps * spec.num_layers)
        # A sum over all routed experts then has entries near 1, all maps together near 0.5.
        routed = spec.num_layers * spec.top_k
        nn.init.normal_(self.routing.weight, std=0.7 / math.sqrt(routed))
        nn.init.normal_(self.pairs, std=0.3 / math.sqrt(routed))
        nn.init.normal_(self.earlier.weight, std=0.35 / math.sqrt(routed))
        nn.init.normal_(self.last_seen.weight, std=SMALL)
        nn.init.normal_(self.tokens.weight[1:], std=SMALL)  # row 0, no id, stays 0
        nn.init.normal_(self.usual.weight, std=0.5 / math.sqrt(config.token_width))
        nn.init.zeros_(self.counts.weight)
        nn.init.constant_(self.counts.bias, COUNTS)
        nn.init.constant_(self.counts.bias[earlier_maps * spec.num_layers :], COUNTS_LEARNT)
        if self.likeness is not None:
            self.likeness.weight.data[:] = begun
            self.ranks = nn.Parameter(rank_weights(spec.top_k))

    def forward(
        self, batch: Batch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "B P L E"]:
        """Logits of every expert of every layer, for each token with its first `seen` layers known.

        rows: of the token table, 0 where unknown (`Vocabulary.rows_of_tokens`).
        """
        return self.answer(*self.encode(batch, rows, seen))

    def with_next(
        self, batch: Batch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> tuple[Float[Tensor, "B P L E"], Float[Tensor, "B A L E"]]:
        """What `forward` says, and of each layer what is said 0 to A - 1 layers before its turn.

        That is of every prefix, for little more: a prefix costs a look, and then only the layers just ahead.
        """
        every = torch.arange(self.spec.num_layers, device=seen.device).expand(len(rows), -1)
        maps, past = self.encode_past(batch, rows)
        layers, near = self.encode_layers(batch)
        similar = self.most_similar(batch, every)
        y = self.look(past[:, None] + self.sum_layers(layers, every))
        further = self.further_maps(batch, near, seen, None if similar is None else similar.of(seen))
        some = torch.arange(len(rows), device=seen.device)[:, None]
        return self.logits(y[some, seen], maps, further), self.next_layers(batch, y, maps, near, similar)

    def encode(
        self, batch: Batch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> tuple[Float[Tensor, "B P D"], Float[Tensor, "B Q L E"], Float[Tensor, "B P F L E"]]:
        """x, the maps that are the same for all prefixes, and the others: of pairs, of similar tokens."""
        maps, past = self.encode_past(batch, rows)
        layers, near = self.encode_layers(batch)
        x = past[:, None] + self.sum_layers(layers, seen)
        return x, maps, self.further_maps(batch, near, seen, self.most_similar(batch, seen))

    def answer(
        self,
        x: Float[Tensor, "B P D"],
        maps: Float[Tensor, "B Q L E"],
        further: Float[Tensor, "B P F L E"],
    ) -> Float[Tensor, "B P L E"]:
        """Logits from what `encode` says."""
        return self.logits(self.look(x), maps, further)

    def look(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        """y."""
        return dropout(self.norm(self.blocks(x)), self.config.dropout, self.training)

    def logits(
        self,
        y: Float[Tensor, "B P D"],
        maps: Float[Tensor, "B Q L E"],
        further: Float[Tensor, "B P F L E"],
    ) -> Float[Tensor, "B P L E"]:
        """Of every layer."""
        logits = self.head(y).unflatten(-1, (self.spec.num_layers, self.spec.num_experts))
        shares = self.shares(y)
        alike, own = shares[:, :, : -self.further], shares[:, :, -self.further :]
        copied: Tensor = torch.einsum("bpql,bqle->bple", alike, maps)
        return (logits + copied + (own[..., None] * further).sum(2)).float()

    def shares(self, y: Float[Tensor, "B P D"]) -> Float[Tensor, "B P Q L"]:
        """How much each layer of each map counts."""
        shares: Tensor = self.counts(y).unflatten(-1, (self.maps, self.spec.num_layers))
        return shares

    def encode_layers(self, batch: Batch) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B L R*E"]]:
        """Of each layer of this token: its embedding, and what it says of the R layers after it."""
        spec, routing = self.spec, self._drop(batch.routing)
        table = self.routing.weight.view(-1, spec.num_layers, 2, spec.num_experts)
        layers = torch.einsum("blce,dlce->bld", routing, table)
        return layers, torch.einsum("blce,lcef->blf", routing, self.pairs)

    def sum_layers(
        self, layers: Float[Tensor, "B L D"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "B P D"]:
        """What the first `seen` layers of this token add to x, and that they are so many."""
        alike, fading = (weights[seen] for weights in self.layer_weights)
        x: Tensor = alike @ layers + self.fading(fading @ layers) + self.last_seen(seen)
        return x

    def next_layers(
        self,
        batch: Batch,
        y: Float[Tensor, "B L D"],
        maps: Float[Tensor, "B Q L E"],
        near: Float[Tensor, "B L R*E"],
        similar: MostSimilar | None,
    ) -> Float[Tensor, "B A L E"]:
        """Logits of each layer 0 to A - 1 layers before its turn; nothing of what is before the first one.

        y, similar: of every prefix. near: what each layer says of those after it.
        """
        layers, experts = self.spec.num_layers, self.spec.num_experts
        weight, bias = self.head.weight.view(layers, experts, -1), self.head.bias.view(layers, experts)
        early = torch.arange(min(NEAREST, layers), device=y.device)
        layer = torch.arange(layers, device=y.device)
        prefix = (layer - early[:, None]).clamp(min=0)  # A L
        shares = self.shares(y).permute(1, 3, 0, 2)[prefix, layer].permute(2, 1, 0, 3)  # B L A Q
        logits = (shares[..., : -self.further] @ maps.permute(0, 2, 1, 3)).transpose(1, 2)
        of_pairs = pairs_ahead(near.unflatten(-1, (-1, experts)), len(early))
        answers = []
        for a in range(len(early)):
            own = shares[:, a:, a, -self.further :, None]
            answer = torch.einsum("bsd,sed->bse", y[:, : layers - a], weight[a:]) + bias[a:]
            answer = answer + own[:, :, 0] * of_pairs[a]
            if similar is not None:
                answer = answer + own[:, :, 1] * similar.routing_ahead(batch.window, a, experts).sqrt()
            answers.append(functional.pad(answer, (0, 0, a, 0)))
        return logits + torch.stack(answers, 1)

    def further_maps(
        self,
        batch: Batch,
        near: Float[Tensor, "B L R*E"],
        seen: Int64[Tensor, "B P"],
        similar: MostSimilar | None,
    ) -> Float[Tensor, "B P F L E"]:
        """The maps that differ by the layers seen."""
        spec = self.spec
        pairs = self.layer_weights[0][seen] @ ahead(near, spec)
        maps = [pairs.unflatten(-1, (spec.num_layers, spec.num_experts))]
        if similar is not None:
            maps += [similar.routing(batch.window, spec.num_experts).sqrt()]
        return torch.stack(maps, 2)

    def counted_ranks(self) -> Float[Tensor, "K"]:
        """What the first, the second expert of a similar token counts: roots are taken of sums of them."""
        return self.ranks.clamp(min=0)

    def most_similar(self, batch: Batch, seen: Int64[Tensor, "B P"]) -> MostSimilar | None:
        """The tokens that were routed most like this one in its first `seen` layers; None: nobody looks."""
        if self.likeness is None:
            return None
        by_layer = shared(batch.targets, batch.window).transpose(1, 2)  # B L W
        plain, lately = (of_layers[seen] @ by_layer for of_layers in self.layer_weights)
        in_common = batch.alike if self.reads_ids else batch.alike.clamp(max=PRESENT)
        score = scores(self.likeness(seen), in_common, plain, lately, batch.preceding)
        return MostSimilar.by(score, self.config.similar, self.counted_ranks())

    def encode_past(
        self, batch: Batch, rows: Int64[Tensor, "B R"]
    ) -> tuple[Float[Tensor, "B Q L E"], Float[Tensor, "B D"]]:
        """What is the same for every prefix of a token: maps, and the share of x from them and the ids."""
        if not self.reads_ids:
            return batch.averages.clamp(min=0).sqrt(), self._encode_maps(batch.averages)
        maps = torch.cat([batch.averages, batch.repeats], 1)
        *tokens, pair = self._drop(self.tokens(rows)).unbind(1)
        tokens[0] = tokens[0] + pair
        x = self._encode_maps(maps) + self.token_trunk(torch.cat(tokens, 1))
        usual = self.usual(tokens[0]).view(-1, 1, self.spec.num_layers, self.spec.num_experts)
        return torch.cat([maps.clamp(min=0).sqrt(), usual], 1), x

    def _encode_maps(self, maps: Float[Tensor, "B Q L E"]) -> Float[Tensor, "B D"]:
        x: Tensor = self.earlier_trunk(self.earlier(self._drop(maps.flatten(2))).flatten(1))
        return x

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.config.input_dropout, self.training)


def ahead(near: Float[Tensor, "*B L R*E"], spec: RoutingSpec) -> Float[Tensor, "*B L L*E"]:
    """What each layer says of the R layers after it, moved to where those are among all L."""
    layers, experts = spec.num_layers, spec.num_experts
    width = layers * experts + near.shape[-1]
    # Rows that are longer by E than they will be: each further one begins E later.
    longer = functional.pad(near, (experts, layers * experts))
    moved = longer.flatten(-2)[..., : layers * width].unflatten(-1, (layers, width))
    return moved[..., : layers * experts]


def pairs_ahead(near: Float[Tensor, "B L R E"], count: int) -> list[Float[Tensor, "B S E"]]:
    """What the first s layers say together of layer s + a, for each a below `count`."""
    layers, reach = near.shape[1:3]
    told = near.new_zeros(near.shape[0], layers, near.shape[-1])
    found = []
    for a in reversed(range(max(reach, count))):
        # The last of them tells it over a + 1 layers, those before it as they told layer s - 1 + (a + 1).
        before = told[:, :-1] + near[:, :-1, a] if a < reach else told[:, :-1]
        told = functional.pad(before, (0, 0, 1, 0))
        found.append(told)
    return [told[:, : layers - a] for a, told in enumerate(reversed(found[-count:]))]


def layer_weights(num_layers: int, decay: float) -> Float[Tensor, "2 L+1 L"]:
    """What each layer counts once the first `seen` are known: all alike; fading from the last one back."""
    age = torch.arange(num_layers + 1)[:, None] - 1 - torch.arange(num_layers)
    return torch.stack([age >= 0, (age >= 0) * decay ** age.clamp(min=0)])
