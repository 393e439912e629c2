"""The `interlayer` predictor: attention over the last tokens, each told by the layers just before.

Its larger kinds, `interlayer-extended` and `interlayer-enhanced`, are the same with other sizes
(`training.presets`). What the trunk says asks a memory of patterns before it is turned into an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from traces.spec import RoutingSpec
from training.predictor_configs import InterlayerConfig
from training.predictors.attention import Encoder, Memory, causal_mask
from training.predictors.window import WindowPredictor
from training.vocabulary import Vocabulary


class InterlayerPredictor(WindowPredictor):
    """One context, one trunk, a memory."""

    def __init__(self, spec: RoutingSpec, config: InterlayerConfig, vocabulary: Vocabulary) -> None:
        super().__init__(spec, config, vocabulary, (config.context,))
        self.trunk = Encoder(
            config.width, config.heads, config.hidden, config.blocks, config.window, config.dropout
        )
        self.memory = Memory(config.width, config.memory)

    def read(
        self, embeddings: Sequence[Float[Tensor, "S W D"]], present: Bool[Tensor, "S W"], queries: int
    ) -> Float[Tensor, "S Q D"]:
        """What the last `queries` tokens of each window see."""
        return self.memory(self.trunk(embeddings[0], causal_mask(present), queries))
