"""One sequence at a time, in arrays that keep their place: most of what a small call costs falls away.

Steps.single -> Single: begin, step, step, ..., advance -> begin, ...

The same as `Steps` of a batch of one, but its arrays are bound to the graphs once, so that a call need not
look at what it is given, nor make anew what it gives: a quarter less time. Inputs are trusted.

single = Steps(load_speculator("gpt-oss-20b")).single()
single.begin(976)
probabilities = single.step(0, np.array([3, 17, 21, 30]), np.ones(4))  # [1, L, E], until the next step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Integer, Real

from speculation.session import Graph

Array: TypeAlias = np.ndarray[Any, Any]
NO_LAYER = -1


class Single:
    """state, token, progress: the sequence's, [1, *shape] each. Whoever writes to them changes it."""

    def __init__(
        self,
        advance: Graph,
        begin: Graph,
        step: Graph,
        carried: tuple[Sequence[Array], Sequence[Array], Sequence[Array]],
        finished: tuple[Array, Array],
    ) -> None:
        """carried: state, token and progress; finished: experts [1, L, K] and gates of a token. All zeros."""
        self.state, self.token, self.progress = carried
        self._finished = finished
        self._token_id = np.zeros(1, np.int64)
        top_k = finished[0].shape[-1]
        self._layer = np.zeros((1, 1), np.int32)
        self._experts = np.zeros((1, 1, top_k), np.int32)
        self._gates = np.zeros((1, 1, top_k), np.float32)
        self._next_state, self._next_progress = (list(map(np.zeros_like, old)) for old in carried[::2])
        self._probabilities = np.zeros(step.outputs[-1].of_one(), np.float32)
        self._advance = advance.bind(
            [*_read(self.state, advance), self._token_id, *finished], self._next_state
        )
        self._begin = begin.bind([*_read(self.state, begin), self._token_id], self.token)
        self._step = step.bind(
            [
                *_read(self.state, step),
                *self.token,
                *self.progress,
                self._layer,
                self._experts,
                self._gates,
            ],
            [*self._next_progress, self._probabilities],
        )

    def advance(
        self,
        token_id: int,
        experts: Integer[np.ndarray, "L K"],
        gates: Real[np.ndarray, "L K"] | float,
    ) -> None:
        """One more finished token. token_id: -1 where unknown."""
        self._token_id[0] = token_id
        for mine, its in zip(self._finished, (experts, gates), strict=True):
            mine[0] = its
        self._advance.run()
        _replace(self.state, self._next_state)

    def begin(self, token_id: int) -> None:
        """The next token, of which no layer was seen. token_id: -1 where unknown."""
        self._token_id[0] = token_id
        self._begin.run()
        for progress in self.progress:
            progress[:] = 0

    def step(
        self, layer: int, experts: Integer[np.ndarray, "K"] | int, gates: Real[np.ndarray, "K"] | float
    ) -> Float32[np.ndarray, "1 L E"]:
        """Take in one more layer: probabilities of every layer, overwritten by the next step.

        layer: NO_LAYER tells of none, and then experts is NO_LAYER, too.
        """
        self._layer[0, 0] = layer
        self._experts[0, 0] = experts
        self._gates[0, 0] = gates
        self._step.run()
        _replace(self.progress, self._next_progress)
        return self._probabilities


def _read(state: Sequence[Array], graph: Graph) -> list[Array]:
    return [state[place] for place in graph.reads]


def _replace(old: Sequence[Array], new: Sequence[Array]) -> None:
    for array, value in zip(old, new, strict=True):
        array[:] = value
