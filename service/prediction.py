"""Running a batch: its contexts replayed from nothing, then one prediction for all its sequences.

Batch -> `predict` -> probabilities -> `service.answers`

.venv/bin/python -m pytest tests/service/test_predict.py
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from service.batch import Batch
from speculation.runtime import Speculator, State


def predict(speculator: Speculator, batch: Batch) -> Float32[np.ndarray, "B L E"]:
    """Probabilities of every layer of every sequence's current token; rows of seen layers mean nothing."""
    if len(batch.current) == len(batch.token_ids):
        # No context: every row is a current token, and picking them would cost as much as checking them.
        return speculator.predict(None, batch.token_ids, batch.experts, batch.gates)
    return _predict(speculator, batch, replay(speculator, batch))


def predict_with_outlook(
    speculator: Speculator, batch: Batch
) -> tuple[Float32[np.ndarray, "B L E"], Float32[np.ndarray, "B L E"]]:
    """Probabilities, as `predict` gives them, and the outlook after each context. Raises OutlookUnknown."""
    state = replay(speculator, batch)
    uses = speculator.outlook(state)
    return _predict(speculator, batch, state), uses


def _predict(speculator: Speculator, batch: Batch, state: State) -> Float32[np.ndarray, "B L E"]:
    current = batch.current
    gates = None if batch.gates is None else batch.gates[current]
    return speculator.predict(state, batch.token_ids[current], batch.experts[current], gates)


def replay(speculator: Speculator, batch: Batch) -> State:
    """The state of every sequence after its context.

    One call a step, for all sequences that have so many tokens left: those with the longest context begin,
    the others join them. So the longest context's length is the number of calls, whatever the batch.
    """
    state = speculator.initial_state(len(batch.current))
    order = np.argsort(-batch.context_tokens, kind="stable")  # longest context first
    lengths, ends = batch.context_tokens[order], batch.current[order]
    for left in range(int(lengths[0]), 0, -1):
        active = int((lengths >= left).sum())
        rows = ends[:active] - left
        gates = None if batch.gates is None else batch.gates[rows]
        before = tuple(tensor[:active] for tensor in state)
        after = speculator.advance(before, batch.token_ids[rows], batch.experts[rows], gates)
        for tensor, advanced in zip(state, after, strict=True):
            tensor[:active] = advanced
    in_request_order = np.argsort(order)
    return tuple(tensor[in_request_order] for tensor in state)
