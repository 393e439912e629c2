"""The model call behind a stream's forecast, and nothing around it: one step of a token, one layer told.

specmoe bench --only stream
"""

from __future__ import annotations

import numpy as np

from specmoe.bench.flow import tokens
from specmoe.bench.model_time import after_context
from speculation.runtime import Speculator
from speculation.steps import Steps


class StepTime:
    """Steps through the tokens of a flow: call 0 at the start of the first, call 1 after its layer 0, ..."""

    def __init__(self, speculator: Speculator, sequences: int) -> None:
        self._steps = Steps(speculator)
        self._layers = speculator.spec.num_layers
        self._tokens = tokens(speculator.spec, sequences)
        state = after_context(speculator, sequences)
        self._read = [state[place] for place in self._steps.step_reads]
        begun = [state[place] for place in self._steps.begin_reads]
        self._begun = [self._steps.begin(begun, token.token_ids) for token in self._tokens]
        self._initial = self._steps.initial_progress(sequences)
        self._progress = self._initial
        shape = (sequences, 1)
        self._numbers = [np.full(shape, layer, np.int32) for layer in range(-1, self._layers - 1)]
        self._none = np.full((*shape, speculator.spec.top_k), -1, np.int32)

    def __call__(self, number: int) -> None:
        """One step. Calls are numbered in order: a step goes on where the one before it ended."""
        place, layer = divmod(number, self._layers)
        token = self._tokens[place % len(self._tokens)]
        if layer == 0:
            self._progress = self._initial
        # At token start no layer is told: the gates beside -1 mean nothing.
        told = slice(layer - 1, layer) if layer else slice(0, 1)
        experts = token.experts[:, told] if layer else self._none
        self._progress, _ = self._steps.step(
            self._read,
            self._begun[place % len(self._tokens)],
            self._progress,
            self._numbers[layer],
            experts,
            token.gates[:, told],
        )
