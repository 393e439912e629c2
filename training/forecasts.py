"""Walks a trace as a model server would, and asks for forecasts on the way, without a look at what comes.

Between a trace and its metrics: every token of every sequence, at every number of layers seen, becomes a
forecast of the layers that are left, ranked and laid beside the truth.

    specmoe evaluate gpt-oss-20b --traces test.npz
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from traces.trace import RoutingTrace
from training.baselines import CHUNK, Baseline
from training.ranked import Ranked, rank_against

if TYPE_CHECKING:  # baselines are scored without ONNX Runtime
    from speculation.runtime import Speculator, State

# One call to predict: enough rows to keep a core busy, few enough that they stay in its cache.
ROWS_AT_ONCE = 512
# Sequences that go along together; their states are all that is held of a trace's length.
SEQUENCES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecasts of N tokens of which layers 0 .. seen-1 were known.

    rows: which tokens of the trace.  ranked: layers seen .. L-1, beside the truth.
    """

    rows: Int[np.ndarray, "N"]
    seen: int
    ranked: Ranked


class Inputs:
    """What a predictor is given of a trace: routing, and token ids, gates and hidden states unless
    withheld."""

    def __init__(
        self, trace: RoutingTrace, *, token_ids: bool = True, gates: bool = True, hidden: bool = False
    ) -> None:
        self._trace = trace
        self._token_ids = trace.token_ids if token_ids else None
        self._gates = trace.gates if gates else None
        self._hidden = trace.hidden if hidden else None

    def of(
        self, rows: Int[np.ndarray, "B"], seen: int
    ) -> tuple[
        Int64[np.ndarray, "B"] | None, Int32[np.ndarray, "B L K"], Float32[np.ndarray, "B L K"] | None
    ]:
        """(token ids, experts, gates) of these tokens; layers from `seen` on are blotted out."""
        experts = self._trace.experts[rows].astype(np.int32)
        experts[:, seen:] = -1
        token_ids = None if self._token_ids is None else self._token_ids[rows].astype(np.int64)
        if self._gates is None:
            return token_ids, experts, None
        gates = self._gates[rows].astype(np.float32)
        gates[:, seen:] = 1.0
        return token_ids, experts, gates

    def newest_hidden(self, rows: Int[np.ndarray, "B"], seen: int) -> Float32[np.ndarray, "B H"] | None:
        """What predict is told of hidden states, if anything."""
        if self._hidden is None:
            return None
        return self._hidden.newest(self._trace.starts, rows, seen).astype(np.float32)


def of_speculator(
    speculator: Speculator,
    trace: RoutingTrace,
    *,
    token_ids: bool = True,
    gates: bool = True,
    hidden: bool = True,
    every: int = 1,
) -> Iterator[Forecast]:
    """Forecasts for every `every`-th token of the trace (the others are still lived through).

    token_ids, gates, hidden: whether the predictor gets them, where it reads them and the trace has them.
    The truth keeps its gates. Raises InputInvalid where hidden states are of another size than it reads.
    """
    reads_hidden = bool(speculator.manifest.hidden_size)
    inputs = Inputs(trace, token_ids=token_ids, gates=gates, hidden=hidden and reads_hidden)
    for rows, state in _gathered(_states(speculator, trace, inputs), every):
        for seen in range(trace.spec.num_layers):
            newest = inputs.newest_hidden(rows, seen)
            told = {} if newest is None else {"hidden": newest}
            probabilities = speculator.predict(state, *inputs.of(rows, seen), **told)
            yield Forecast(rows, seen, _beside_truth(probabilities, trace, rows, seen))


def states(
    speculator: Speculator, trace: RoutingTrace, *, every: int = 1
) -> Iterator[tuple[Int[np.ndarray, "N"], State]]:
    """Every `every`-th token of the trace and the state before it, many at a time, in no order."""
    return _gathered(_states(speculator, trace, Inputs(trace)), every)


def of_baseline(baseline: Baseline, trace: RoutingTrace, *, every: int = 1) -> Iterator[Forecast]:
    """Forecasts of a fitted baseline for every `every`-th token, a few sequences at a time."""
    for part, first in _parts(trace):
        kept = np.flatnonzero((first + np.arange(part.num_tokens)) % every == 0)
        whole = None
        for seen in range(trace.spec.num_layers):
            if whole is None:
                ranked = _beside_truth(baseline.scores(part, seen)[kept], part, kept, seen)
                whole = None if baseline.follows_layers else ranked
            else:
                ranked = whole.from_layer(seen)
            yield Forecast(first + kept, seen, ranked)


def _beside_truth(
    scores: Float32[np.ndarray, "N L E"], trace: RoutingTrace, rows: Int[np.ndarray, "N"], seen: int
) -> Ranked:
    gates = None if trace.gates is None else trace.gates[rows, seen:]
    return rank_against(scores[:, seen:], trace.experts[rows, seen:], gates)


def _states(
    speculator: Speculator, trace: RoutingTrace, inputs: Inputs
) -> Iterator[tuple[Int[np.ndarray, "B"], State]]:
    """Tokens that stand at the same position of their sequences, and the states before them."""
    lengths = np.diff(trace.starts)
    longest_first = np.argsort(-lengths, kind="stable")
    for first in range(0, len(lengths), SEQUENCES_AT_ONCE):
        sequences = longest_first[first : first + SEQUENCES_AT_ONCE]
        state = speculator.initial_state(len(sequences))
        for position in range(int(lengths[sequences[0]])):
            going = int(np.count_nonzero(lengths[sequences] > position))
            state = tuple(tensor[:going] for tensor in state)
            rows = trace.starts[sequences[:going]] + position
            yield rows, state
            state = speculator.advance(state, *inputs.of(rows, trace.spec.num_layers))


def _gathered(
    states: Iterator[tuple[Int[np.ndarray, "B"], State]], every: int
) -> Iterator[tuple[Int[np.ndarray, "N"], State]]:
    """Every `every`-th token and its state, many positions put together."""
    held: list[tuple[Int[np.ndarray, "B"], State]] = []
    tokens = 0
    for rows, state in states:
        kept = rows % every == 0
        held.append((rows[kept], tuple(tensor[kept] for tensor in state)))
        tokens += len(held[-1][0])
        if tokens >= ROWS_AT_ONCE:
            yield _joined(held)
            held, tokens = [], 0
    if tokens:
        yield _joined(held)


def _joined(held: list[tuple[Int[np.ndarray, "B"], State]]) -> tuple[Int[np.ndarray, "N"], State]:
    rows = np.concatenate([rows for rows, _ in held])
    tensors = zip(*(state for _, state in held), strict=True)
    return rows, tuple(np.concatenate(parts) for parts in tensors)


def _parts(trace: RoutingTrace) -> Iterator[tuple[RoutingTrace, int]]:
    """The trace in pieces of whole sequences, about CHUNK tokens each, and the row each piece begins at."""
    first = 0
    for last in range(1, trace.num_sequences + 1):
        tokens = trace.starts[last] - trace.starts[first]
        if tokens >= CHUNK or (last == trace.num_sequences and tokens):
            yield trace.select(range(first, last)), int(trace.starts[first])
            first = last
