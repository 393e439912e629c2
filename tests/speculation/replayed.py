"""A sequence that is worked out from scratch whenever it is asked: slow, and too simple to be wrong.

Speculator.advance for each finished token, from the initial state on, then Speculator.predict
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from speculation.runtime import Speculator


class Replayed:
    """What was told of a sequence. seen: layers of the current token. started: tokens begun."""

    def __init__(self, speculator: Speculator) -> None:
        self._speculator, self._spec = speculator, speculator.spec
        self._past: list[tuple[np.ndarray[Any, Any], ...]] = []
        self.started = 0
        self.seen = 0

    def start(self, token_id: int = -1) -> None:
        """Begin a token. One before it that is unfinished is forgotten."""
        slots = (1, self._spec.num_layers, self._spec.top_k)
        self._current = np.full(1, token_id), np.full(slots, -1, np.int32), np.ones(slots, np.float32)
        self.started += 1
        self.seen = 0

    def tell(self, experts: ArrayLike, gates: ArrayLike | None = None) -> None:
        """The next m layers' routing [m, K]. The last one makes the token history."""
        told = np.asarray(experts)
        _, all_experts, all_gates = self._current
        all_experts[0, self.seen : self.seen + len(told)] = told
        if gates is not None:
            all_gates[0, self.seen : self.seen + len(told)] = np.asarray(gates)
        self.seen += len(told)
        if self.seen == self._spec.num_layers:
            self._past.append(self._current)

    def probabilities(self) -> np.ndarray[Any, Any]:
        """[L, E] of the current token; rows of layers that were told mean nothing."""
        state = self._speculator.initial_state(1)
        for token in self._past:
            state = self._speculator.advance(state, *token)
        return self._speculator.predict(state, *self._current)[0]
