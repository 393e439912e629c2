"""The `prefix-hidden` predictor: `prefix`, and what the last router that ran was given, added to its trunk.

Comes after `hidden_states`, before `loop` and `export`.

    x = ... + G n(h)            n: divided by its root mean square; 0 where no h is told

What is served is what `prefix` serves, with h in predict alone: begin and step, for streams, know nothing
of it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from jaxtyping import Float, Int64
from torch import Tensor, nn

from model_store.manifest import PREDICT
from traces.spec import RoutingSpec
from training.calibration import Calibration
from training.dropout import dropout
from training.hidden_states import PrefixHiddenBatch
from training.predictor_configs import PrefixHiddenConfig
from training.predictors import prefix_graphs, prefix_past_graphs
from training.predictors.predictor import Predictor
from training.predictors.prefix import PrefixPredictor
from training.predictors.probes import is_told, kept, scaled
from training.served import Served
from training.vocabulary import Vocabulary


class PrefixHiddenPredictor(Predictor):
    """prefix: what reads routing. inner: G."""

    def __init__(
        self, spec: RoutingSpec, config: PrefixHiddenConfig, vocabulary: Vocabulary, hidden_size: int
    ) -> None:
        super().__init__()
        self.spec, self.config, self.vocabulary = spec, config, vocabulary
        self.hidden_size = hidden_size
        self.prefix = PrefixPredictor(spec, config.prefix, vocabulary)
        self.reads_ids = self.prefix.reads_ids
        self.inner = nn.Linear(hidden_size, config.prefix.width, bias=False)
        nn.init.normal_(self.inner.weight, std=0.5 / math.sqrt(hidden_size))

    def forward(
        self, batch: PrefixHiddenBatch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "B P L E"]:
        """Logits of every expert of every layer, for each token with its first `seen` layers known."""
        x, maps, further = self.prefix.encode(batch.prefix, rows, seen)
        h = scaled(kept(batch.hidden.at(seen), self.config.drop_hidden, self.training))
        h = dropout(h, self.config.prefix.input_dropout, self.training)
        return self.prefix.answer(x + self.inner(h), maps, further)


def served(predictor: PrefixHiddenPredictor, calibration: Calibration) -> Served:
    """The four functions of its `prefix`, but for predict, which takes a hidden state besides."""
    functions = prefix_graphs.served(predictor.prefix, calibration)
    graphs = {**functions.graphs, PREDICT: Predict(predictor, calibration)}
    return replace(functions, graphs=graphs, hidden_size=predictor.hidden_size)


class Predict(nn.Module):
    """What the predict of `prefix` says, and a hidden state besides."""

    def __init__(self, predictor: PrefixHiddenPredictor, calibration: Calibration) -> None:
        super().__init__()
        begin = prefix_past_graphs.Begin(predictor.prefix, calibration)
        step = prefix_graphs.Step(predictor.prefix, calibration)
        self.routing = prefix_graphs.Predict(begin, step)
        self.inner, self.calibration = predictor.inner, calibration

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B L E"]:
        """inputs: those of that predict, then hidden [B, H]."""
        *others, hidden = inputs
        logits, row = self.routing.logits(*others, further=self.inner(scaled(hidden)))
        return self.calibration(logits, row + self.calibration.first_row_told(is_told(hidden)))
