"""Are the exported graphs what was trained? Real tokens through torch and ONNX Runtime, side by side.

exported graphs + validation trace -> check_parity -> published, or ExportFailed

Torch's own functions are the reference for predict and advance, and predict for begin and step, whether the
layers seen are told at once or one by one. And what was trained, as training asks it, is the reference for
what is served along a sequence, with token ids and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from model_store.manifest import ADVANCE, PREDICT, STEP, GraphName
from model_store.store import StoredVersion
from speculation.runtime import Speculator, State
from speculation.steps import Steps, step_through
from traces.trace import RoutingTrace
from training.calibration import Calibration
from training.errors import ExportFailed
from training.examples import Batch, Examples
from training.predictors.predictor import Predictor
from training.served import Served

# ONNX Runtime adds in another order than torch; nothing else may differ.
TOLERANCE = 1e-4
# In half precision a number that lies between two may be rounded to either: of numbers above 1, relative.
HALF_TOLERANCE = 1e-3
# What steps pass on is rounded, to bytes and halves, where predict rounds nothing.
STEPS_TOLERANCE = 5e-3
TOKENS = 64

# Served, repeats are kept in bytes: for the bundled predictors 0.001 at most. Random weights make it more.
TRAINED_TOLERANCE = 0.01

# Weights and activations in 8 bits: for the bundled predictors 0.03 at most and 0.0008 on average.
QUANTIZED_TOLERANCE = 0.1
QUANTIZED_MEAN_TOLERANCE = 0.005

Array = np.ndarray[Any, Any]


def check_parity(functions: Served, stored: StoredVersion, trace: RoutingTrace) -> None:
    """Raises ExportFailed where graphs and torch, or predict and steps, part by more than 1e-4; by more than
    1e-3 what is in half precision, and by more than 5e-3 steps that pass on less."""
    passed_on = (*stored.manifest.token, *stored.manifest.progress)
    of_steps = STEPS_TOLERANCE if any(t.dtype == "float16" for t in passed_on) else TOLERANCE
    speculator = Speculator(stored, provider="cpu", origin="the export")
    steps = Steps(speculator)
    num_layers = trace.spec.num_layers
    state = speculator.initial_state(1)
    for token in range(min(TOKENS, int(trace.starts[1]))):
        ids, experts, gates = _inputs(trace, token)
        shown = experts.copy()
        shown[:, token % num_layers :] = -1
        answer = speculator.predict(state, ids, shown, gates)
        untold = speculator.untold(1)
        _check(
            f"predict at token {token}",
            [answer],
            _torch(functions, PREDICT, state, ids, shown, gates, *untold),
        )
        if hidden := _hidden(trace, token, token % num_layers):
            told = speculator.predict(state, ids, shown, gates, *hidden)
            theirs = _torch(functions, PREDICT, state, ids, shown, gates, *hidden)
            _check(f"predict with a hidden state at token {token}", [told], theirs)
        for at_once in (num_layers, 1) if STEP in functions.graphs else ():
            stepped = step_through(steps, state, ids, shown, gates, at_once)
            _check(f"steps of {at_once} layers at token {token}", [stepped], [answer], of_steps)
        after = speculator.advance(state, ids, experts, gates)
        _check(f"advance at token {token}", after, _torch(functions, ADVANCE, state, ids, experts, gates))
        state = after


@torch.no_grad()
def check_trained(
    predictor: Predictor,
    calibration: Calibration,
    blocks: Examples[Batch],
    stored: StoredVersion,
    trace: RoutingTrace,
) -> None:
    """Raises ExportFailed where what is served along a sequence is not what was trained, calibrated.

    blocks: of `trace`, as the survey asks them.
    """
    tokens = min(TOKENS, int(trace.starts[1]))
    numbers = np.flatnonzero(blocks.first < tokens)
    batch = blocks.draw(numbers, np.zeros(len(numbers), bool))
    seen = torch.arange(len(batch.targets)) % trace.spec.num_layers
    for known in (True, False) if predictor.reads_ids else (False,):
        nobody = torch.zeros(len(seen), dtype=torch.bool)
        asked = batch if known else batch.hiding(history=nobody, ids=~nobody)
        rows = torch.from_numpy(predictor.vocabulary.rows_of_tokens(asked.token_ids.numpy()))
        logits = predictor(asked, rows, seen[:, None])[:, 0]
        row = calibration.first_row(torch.full(seen.shape, known)) + seen.int()
        if predictor.hidden_size:
            told = [any(hidden.any() for hidden in _hidden(trace, *at)) for at in enumerate(seen.tolist())]
            row += calibration.first_row_told(torch.tensor(told))
        expected = calibration(logits, row).numpy()[:tokens]
        came = _along(stored, trace, tokens, known)
        ahead = np.arange(trace.spec.num_layers) >= seen.numpy()[:tokens, None]
        apart = float(np.abs(came - expected)[ahead].max())
        if not apart <= TRAINED_TOLERANCE:
            raise ExportFailed(
                f"{'With' if known else 'Without'} token ids, what is served differs from what was trained by"
                f" {apart:.3f}, expected {TRAINED_TOLERANCE} at most.",
                remedy="Report this with the command that trained it.",
            )


def _along(stored: StoredVersion, trace: RoutingTrace, tokens: int, known: bool) -> Array:
    """Probabilities along the first sequence, the number of layers seen as in the other checks."""
    speculator = Speculator(stored, provider="cpu", origin="the export")
    state, came = speculator.initial_state(1), []
    for token in range(tokens):
        ids, experts, gates = _inputs(trace, token)
        ids = ids if known else np.full(1, -1, np.int64)
        seen, shown = token % trace.spec.num_layers, experts.copy()
        shown[:, seen:] = -1
        came.append(speculator.predict(state, ids, shown, gates, *_hidden(trace, token, seen)))
        state = speculator.advance(state, ids, experts, gates)
    return np.concatenate(came)


def check_quantized(exact: StoredVersion, small: StoredVersion, trace: RoutingTrace) -> None:
    """Raises ExportFailed where 8 bits change an answer by more than 0.1 anywhere, or 0.005 on average."""
    speculators = [Speculator(stored, provider="cpu", origin="the export") for stored in (exact, small)]
    states = [speculator.initial_state(1) for speculator in speculators]
    apart = []
    for token in range(min(TOKENS, int(trace.starts[1]))):
        ids, experts, gates = _inputs(trace, token)
        seen = token % trace.spec.num_layers
        shown = experts.copy()
        shown[:, seen:] = -1
        hidden = _hidden(trace, token, seen)
        ours, theirs = (
            speculator.predict(state, ids, shown, gates, *hidden)[:, seen:]
            for speculator, state in zip(speculators, states, strict=True)
        )
        apart.append(np.abs(ours - theirs).ravel())
        states = [
            speculator.advance(state, ids, experts, gates)
            for speculator, state in zip(speculators, states, strict=True)
        ]
    differences = np.concatenate(apart)
    if not (differences.max() <= QUANTIZED_TOLERANCE and differences.mean() <= QUANTIZED_MEAN_TOLERANCE):
        raise ExportFailed(
            f"In 8 bits, probabilities differ by {differences.max():.3f} at most and "
            f"{differences.mean():.4f} on average, "
            f"expected {QUANTIZED_TOLERANCE} and {QUANTIZED_MEAN_TOLERANCE} at most.",
            remedy="Train with more --weight-decay: a few weights are far larger than those beside them.",
        )


def _inputs(trace: RoutingTrace, token: int) -> tuple[Array, Array, Array]:
    row = slice(token, token + 1)
    experts = trace.experts[row].astype(np.int32)
    ids = np.full(1, -1, np.int64) if trace.token_ids is None else trace.token_ids[row].astype(np.int64)
    known = np.ones(experts.shape) if trace.gates is None else trace.gates[row]
    return ids, experts, known.astype(np.float32)


def _hidden(trace: RoutingTrace, token: int, seen: int) -> tuple[Array, ...]:
    """What predict is told of hidden states, if anything."""
    if trace.hidden is None:
        return ()
    return (trace.hidden.newest(trace.starts, np.array([token]), seen).astype(np.float32),)


@torch.no_grad()
def _torch(functions: Served, name: GraphName, state: State, *routing: Array) -> list[Array]:
    named = {tensor.name: array for tensor, array in zip(functions.state, state, strict=True)}
    inputs = [*(named[read] for read in functions.reads[name]), *routing]
    came = functions.graphs[name](*map(torch.from_numpy, inputs))
    return [tensor.numpy() for tensor in (came if isinstance(came, tuple) else (came,))]


def _check(what: str, came: Sequence[Array], expected: Sequence[Array], tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(came, expected, strict=True):
        differences = np.abs(ours.astype(np.float64) - theirs)
        allowed = tolerance
        if ours.dtype == np.float16:
            allowed, differences = HALF_TOLERANCE, differences / np.maximum(1.0, np.abs(theirs))
        apart = float(differences.max())
        if not apart <= allowed:
            raise ExportFailed(
                f"{what}: two answers differ by {apart:.1e}, expected {allowed} at most.",
                remedy="Report this with the versions of torch and onnxruntime.",
            )
