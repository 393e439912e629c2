"""What every trainable predictor is: a torch module that answers for all layers from those seen so far."""

from __future__ import annotations

from typing import Any

from torch import nn

from traces.spec import RoutingSpec
from training.examples import Batch, Examples
from training.vocabulary import Vocabulary


class Predictor(nn.Module):
    """forward(batch, rows [B, R], seen [B, P]) -> logits [B, P, L, E]; in training perhaps [M, B, P, L, E].

    batch: of the examples it reads. rows: of the token table, for the batch's token ids. seen: how many
    layers are known, P times for each token. With a leading axis of M, each of M answers is scored alone.
    spec, config, vocabulary: what it is for; kept for export. reads_ids: whether token ids change anything.
    """

    spec: RoutingSpec
    config: Any
    vocabulary: Vocabulary
    reads_ids: bool

    def settle(self, validation: Examples[Batch]) -> None:
        """Before it is calibrated, decide what the validation split decides. Mostly nothing."""

    def settled(self) -> dict[str, Any]:
        """What was decided, for the manifest."""
        return {}
