"""What `interlayer` and `multiscale` share: how a window is embedded, and how all layers are answered.

Comes after `windows`, before `loop` and `window_graphs`. With s layers of the present token seen, every token
of the window is told by the same layers, those just before layer s: of the present token the last ones seen,
and those of the token before it where s is smaller than their number.

    embedding_t(s) = 1/C sum_c sum_e share[t, s - c, e] A[s - c, e] + layer[s]        c = 1 .. C
    y = read(embeddings)[present token]
    z[l, e] = sharpness(y)[l] head(y)[l, e]                                            0 < sharpness < 2

Past tokens tell nothing else, and a token sees only those before it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from traces.spec import RoutingSpec
from training.dropout import dropout
from training.predictor_configs import InterlayerConfig, MultiscaleConfig
from training.predictors.predictor import Predictor
from training.vocabulary import Vocabulary
from training.windows import WindowBatch

SMALL = 0.02


class WindowPredictor(Predictor):
    """contexts: C of each embedding that a token has, ascending. Token ids are not used."""

    def __init__(
        self,
        spec: RoutingSpec,
        config: InterlayerConfig | MultiscaleConfig,
        vocabulary: Vocabulary,
        contexts: Sequence[int],
    ) -> None:
        super().__init__()
        self.spec, self.config, self.vocabulary = spec, config, vocabulary
        self.contexts = tuple(contexts)
        self.reads_ids = False
        width = config.width
        self.experts = nn.Embedding(spec.num_layers * spec.num_experts, width)
        self.layer = nn.Embedding(spec.num_layers, width)
        self.head = nn.Linear(width, spec.num_layers * spec.num_experts)
        self.sharpness = nn.Linear(width, spec.num_layers)
        # The mean over a few experts and layers then has entries near 1.
        nn.init.normal_(self.experts.weight, std=math.sqrt(spec.top_k))
        nn.init.normal_(self.layer.weight, std=SMALL)
        nn.init.zeros_(self.sharpness.weight)
        nn.init.zeros_(self.sharpness.bias)

    @abstractmethod
    def read(
        self, embeddings: Sequence[Float[Tensor, "S W D"]], present: Bool[Tensor, "S W"], queries: int
    ) -> Float[Tensor, "S Q D"]:
        """What the last `queries` tokens of each window see. embeddings: one for each of the contexts."""

    def forward(
        self, batch: WindowBatch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "B P L E"]:
        """Logits of every expert of every layer. seen: the same for all tokens of a block."""
        by_block = seen[batch.first]  # N P
        prefixes = by_block.shape[1]
        weights = dropout(batch.weights, self.config.input_dropout, self.training)
        embeddings = [e.flatten(0, 1) for e in self.embeddings(weights, by_block)]
        present = batch.present.repeat_interleave(prefixes, 0)
        y = self.read(embeddings, present, batch.inside.shape[1])  # N*P T D
        return self.answer(y.unflatten(0, (-1, prefixes)).transpose(1, 2)[batch.inside])

    def embeddings(
        self, weights: Float[Tensor, "N W L E"], seen: Int64[Tensor, "N P"]
    ) -> list[Float[Tensor, "N P W D"]]:
        """For each of the contexts: what the tokens of each stretch tell, with so many layers seen."""
        (stretches, window, layers, _), most = weights.shape, self.contexts[-1]
        table = self.experts.weight.unflatten(0, (layers, -1))
        told = torch.einsum("nwle,led->nwld", weights, table).flatten(1, 2)
        told = functional.pad(told, (0, 0, most, 0))  # before the stretch, nothing
        stretch, token, back = (torch.arange(n, device=seen.device) for n in (stretches, window, most))
        place = seen[:, :, None, None] + token[:, None] * layers + (most - 1 - back)  # N P W C
        last = told[stretch[:, None, None, None], place]  # N P W C D
        layer = self.layer(seen)[:, :, None]
        return [last[..., :count, :].sum(-2) / count + layer for count in self.contexts]

    def answer(self, y: Float[Tensor, "*B D"]) -> Float[Tensor, "*B L E"]:
        """Logits, sharpened or flattened by layer."""
        logits = self.head(y).unflatten(-1, (self.spec.num_layers, self.spec.num_experts))
        return logits * (2 * torch.sigmoid(self.sharpness(y)))[..., None]
