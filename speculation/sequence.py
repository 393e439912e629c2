"""One sequence, decoded layer by layer: the convenient form of a Speculator, for use inside a model server.

sequence = Sequence(load_speculator("gpt-oss-20b"))
sequence.start_token(token_id)
for layer in range(24):
    prefetch(sequence.forecast(top_n=8, layers=range(layer, min(layer + 3, 24))))
    sequence.observe(routed_experts, gates)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32
from numpy.typing import ArrayLike

from speculation.errors import InputInvalid
from speculation.ranking import expected_recall, rank
from speculation.runtime import Speculator


class LayerForecast(NamedTuple):
    """Experts to fetch for one layer, best first.

    distance: layers ahead of the last seen one (at the start of a token: layer + 1).
    expected_recall: the share of the routed experts expected among these.
    """

    layer: int
    distance: int
    experts: Int32[np.ndarray, "n"]
    probabilities: Float32[np.ndarray, "n"]
    expected_recall: float


class Sequence:
    """Follows one sequence: tokens in order, and of each token its layers in order.

    Holds the state of one sequence, so that each needs its own; the Speculator behind it is shared.
    """

    def __init__(self, speculator: Speculator) -> None:
        self._speculator = speculator
        self._spec = speculator.spec
        self._state = speculator.initial_state(1)
        slots = (1, self._spec.num_layers, self._spec.top_k)
        self._token_ids = np.full(1, -1, np.int64)
        self._experts = np.full(slots, -1, np.int32)
        self._gates = np.ones(slots, np.float32)
        self._hidden: Float32[np.ndarray, "1 H"] | None = None
        self._started = False
        self._seen = 0

    @property
    def seen(self) -> int:
        """How many layers of the current token were observed."""
        return self._seen

    def start_token(self, token_id: int = -1) -> None:
        """Begin the next token; a finished one before it is ended. InputInvalid on an unfinished one."""
        if self._started:
            self.end_token()
        self._token_ids[0] = token_id
        self._experts.fill(-1)
        self._gates.fill(1.0)
        self._started = True
        self._seen = 0

    def observe(
        self, experts: ArrayLike, gates: ArrayLike | None = None, hidden: ArrayLike | None = None
    ) -> int:
        """Tell what the next layer was routed to. Returns that layer.

        experts: K different ids; gates: their K router weights, any positive scale, None where unknown.
        hidden: the H numbers that the layer's router was given, for a version that reads them, None where
        unknown; the last ones told count until the next layer. Raises InputInvalid.
        """
        self._check_started()
        layer = self._seen
        if layer == self._spec.num_layers:
            raise InputInvalid(
                f"All {layer} layers of this token were observed.",
                remedy="Begin the next one with start_token().",
            )
        # Both are checked before either is kept: a refused layer leaves no half of itself behind.
        routed, weights = self._routed(experts), 1.0 if gates is None else self._weights(gates)
        self._hidden = self._newest(hidden)
        self._experts[0, layer] = routed
        self._gates[0, layer] = weights
        self._seen += 1
        return layer

    def forecast(
        self, *, top_n: int | None = None, coverage: float | None = None, layers: Iterable[int] | None = None
    ) -> list[LayerForecast]:
        """What the layers not seen yet will need.

        top_n: experts of each layer (None: as many as are routed). coverage: instead, as many as hold all the
        routed ones with this probability: fewer where the forecast is sure. layers: which layers not seen yet
        (None: all of them). Raises InputInvalid, CoverageUnknown.
        """
        self._check_started()
        wanted = self._unseen(layers)
        if not wanted:
            return []
        if coverage is not None and top_n is not None:
            raise InputInvalid(
                f"Both top_n {top_n} and coverage {coverage} were given.", remedy="Give one of them."
            )
        probabilities = self._speculator.predict(
            self._state, self._token_ids, self._experts, self._gates, self._hidden
        )[0]
        if coverage is None:
            sizes = [self._spec.top_k if top_n is None else top_n] * len(wanted)
        else:
            sets = self._speculator.coverage_sets(coverage)
            sizes = sets.sizes(probabilities, self._seen)[wanted].tolist()
        experts, ranked = rank(probabilities.take(wanted, axis=0), max(sizes))
        listed = np.arange(max(sizes)) < np.array(sizes)[:, None]  # [layers, n]
        recalls = expected_recall(np.where(listed, ranked, 0.0), self._spec.top_k).tolist()
        return [
            LayerForecast(
                layer=layer,
                distance=layer - self._seen + 1,
                experts=experts[row, :n],
                probabilities=ranked[row, :n],
                expected_recall=recalls[row],
            )
            for row, (layer, n) in enumerate(zip(wanted, sizes, strict=True))
        ]

    def end_token(self) -> None:
        """The token is finished: from now on it is history. Raises InputInvalid where layers are missing."""
        self._check_started()
        if self._seen < self._spec.num_layers:
            raise InputInvalid(
                f"{self._seen} layers of this token were observed, expected {self._spec.num_layers}.",
                remedy="Observe all its layers before the next token: only whole tokens become history.",
            )
        self._state = self._speculator.advance(self._state, self._token_ids, self._experts, self._gates)
        self._started = False

    def _check_started(self) -> None:
        if not self._started:
            raise InputInvalid("No token has begun.", remedy="Begin one with start_token().")

    def _routed(self, experts: ArrayLike) -> Int32[np.ndarray, "K"]:
        ids = np.asarray(experts)
        spec = self._spec
        if ids.shape != (spec.top_k,) or ids.dtype.kind not in "iu":
            raise InputInvalid(
                f"experts is {ids.dtype} {list(ids.shape)}, expected {spec.top_k} whole numbers.",
                remedy="Give the ids of the routed experts of one layer.",
            )
        if len(set(ids.tolist())) < spec.top_k or ids.min() < 0 or ids.max() >= spec.num_experts:
            raise InputInvalid(
                f"experts is {ids.tolist()}, expected different ids from 0 to {spec.num_experts - 1}.",
                remedy="Use the model's logical expert ids, before any remap for load balancing.",
            )
        return ids.astype(np.int32)

    def _weights(self, gates: ArrayLike) -> Float32[np.ndarray, "K"]:
        weights = np.asarray(gates, np.float32)
        top_k = self._spec.top_k
        if weights.shape != (top_k,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise InputInvalid(
                f"gates is {weights.tolist()}, expected {top_k} finite weights from 0, not all 0.",
                remedy="Give the router's weights after its softmax, or None where they are unknown.",
            )
        return weights

    def _newest(self, hidden: ArrayLike | None) -> Float32[np.ndarray, "1 H"] | None:
        if hidden is None:
            return None
        newest = np.array(hidden, np.float32)[None]
        self._speculator.check_hidden(newest, 1)
        return newest

    def _unseen(self, layers: Iterable[int] | None) -> list[int]:
        unseen = range(self._seen, self._spec.num_layers)
        wanted = list(unseen if layers is None else layers)
        if wrong := [layer for layer in wanted if layer not in unseen]:
            raise InputInvalid(
                f"Layer {wrong[0]} was asked for, expected {self._seen} to {self._spec.num_layers - 1}.",
                remedy="Ask for layers of this token that were not seen yet.",
            )
        return wanted
