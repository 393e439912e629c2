"""What every trainable predictor is: a torch module that answers for all layers from those seen so far."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from traces.spec import RoutingSpec
from training.examples import Batch, Examples
from training.vocabulary import Vocabulary


class Predictor(nn.Module):
    """forward(batch, rows [B, R], seen [B, P]) -> logits [B, P, L, E]; in training perhaps [M, B, P, L, E].

    batch: of the examples it reads. rows: of the token table, for the batch's token ids. seen: how many
    layers are known, P times for each token. With a leading axis of M, each of M answers is scored alone.
    spec, config, vocabulary: what it is for; kept for export. reads_ids, reads_gates: whether these
    change anything. hidden_size: of the hidden states it reads, 0 where it reads none. has_next: whether it
    has `with_next`.
    """

    spec: RoutingSpec
    config: Any
    vocabulary: Vocabulary
    reads_ids: bool
    reads_gates: bool = True
    hidden_size: int = 0
    has_next: bool = False

    def with_next(
        self, batch: Any, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> tuple[Float[Tensor, "B P L E"], Float[Tensor, "B A L E"]]:
        """What `forward` says, and the logits of each layer 0 to A - 1 layers before its turn.

        A is `loss.NEAREST`, at most L.
        """
        raise NotImplementedError

    def prepare(self, train: Examples[Batch]) -> None:
        """Before it is trained, take over what is known without training. Mostly nothing."""

    def settle(self, validation: Examples[Batch]) -> None:
        """Before it is calibrated, decide what the validation split decides. Mostly nothing."""

    def settle_as(self, other: Predictor) -> None:
        """Decide the same as one of the same kind has."""

    def settled(self) -> dict[str, Any]:
        """What was decided, for the manifest."""
        return {}
