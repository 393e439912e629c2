"""One token after another, and of each token its layers step by step: nothing is worked out twice.

Speculator -> Steps -> begin, step, step, ..., advance -> begin, ...

`Speculator.predict` starts from scratch whenever it is asked. A decode loop asks again after each layer, so
a version may carry two graphs more: begin does what is the same for a whole token, step takes in the layers
seen since the last step. Where a version has none, predict answers, and callers see no difference but time.

    steps = Steps(load_speculator("gpt-oss-20b"))
    token = steps.begin([state[place] for place in steps.begin_reads], token_ids)
    progress, probabilities = steps.step(
        [state[place] for place in steps.step_reads], token, steps.initial_progress(1), layers, experts, gates
    )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32, Int64

from model_store.manifest import ADVANCE, BEGIN, PREDICT, STEP, StateTensor
from speculation.single import Single
from traces.spec import RoutingSpec

if TYPE_CHECKING:
    from speculation.runtime import Speculator

Array: TypeAlias = np.ndarray[Any, Any]


class Steps:
    """Runs one version incrementally. Holds no sequence, so threads may share it.

    Inputs are trusted: whoever took them in has checked them (`speculation.inputs`).
    state, token, progress: what a sequence carries, arrays [B, *shape]: from token to token, during a token
    as `begin` makes it, and from step to step. begin_reads, step_reads: which of the state's tensors these
    take, by their place; they are given just those.
    """

    def __init__(self, speculator: Speculator) -> None:
        way: _Way = _InSteps(speculator) if STEP in speculator.graphs else _FromScratch(speculator)
        self._way = way
        self._advance = speculator.graphs[ADVANCE]
        self.spec: RoutingSpec = speculator.spec
        self.state: tuple[StateTensor, ...] = speculator.manifest.state
        self.token, self.progress = way.token, way.progress
        self.begin_reads, self.step_reads = way.begin_reads, way.step_reads

    def initial_progress(self, batch: int) -> tuple[Array, ...]:
        """The progress of `batch` tokens of which no layer was seen: zeros."""
        return tuple(np.zeros((batch, *t.shape), t.dtype) for t in self.progress)

    def advance(
        self,
        state: Sequence[Array],
        token_ids: Int64[np.ndarray, "B"],
        experts: Int32[np.ndarray, "B L K"],
        gates: Float32[np.ndarray, "B L K"],
    ) -> tuple[Array, ...]:
        """The state, from all its tensors, after one more finished token of each sequence."""
        return tuple(
            self._advance(*[state[place] for place in self._advance.reads], token_ids, experts, gates)
        )

    def begin(self, state: Sequence[Array], token_ids: Int64[np.ndarray, "B"]) -> tuple[Array, ...]:
        """What stays the same during a token.

        state: the tensors of `begin_reads`. token_ids: -1 where unknown.
        """
        return self._way.begin(state, token_ids)

    def step(
        self,
        state: Sequence[Array],
        token: Sequence[Array],
        progress: Sequence[Array],
        layers: Int32[np.ndarray, "B M"],
        experts: Int32[np.ndarray, "B M K"],
        gates: Float32[np.ndarray, "B M K"],
    ) -> tuple[tuple[Array, ...], Float32[np.ndarray, "B L E"]]:
        """Take in what was seen since the last step: (the next progress, probabilities of every layer).

        state: the tensors of `step_reads`. layers: ascending in a row, M >= 1; -1 tells of no layer, and so
        must its experts. A layer that is passed over counts nothing.
        """
        return self._way.step(state, token, progress, layers, experts, gates)

    def single(self) -> Single | None:
        """One sequence, of which nothing has happened yet. None where the version cannot go step by step."""
        if not isinstance(self._way, _InSteps):
            return None
        routed = (1, self.spec.num_layers, self.spec.top_k)
        state, token, progress = (
            [np.zeros((1, *t.shape), t.dtype) for t in tensors]
            for tensors in (self.state, self.token, self.progress)
        )
        finished = np.zeros(routed, np.int32), np.zeros(routed, np.float32)
        way = self._way
        return Single(self._advance, way.begin_graph, way.step_graph, (state, token, progress), finished)


def step_through(
    steps: Steps,
    state: Sequence[Array],
    token_ids: Int64[np.ndarray, "B"],
    experts: Int32[np.ndarray, "B L K"],
    gates: Float32[np.ndarray, "B L K"],
    at_once: int,
) -> Float32[np.ndarray, "B L E"]:
    """What `Speculator.predict` answers, in steps of `at_once` layers: for comparing the two.

    state: all its tensors. experts: -1 in every slot of a layer not seen.
    """
    read = [state[place] for place in steps.step_reads]
    token = steps.begin([state[place] for place in steps.begin_reads], token_ids)
    progress = steps.initial_progress(len(experts))
    numbers = np.arange(steps.spec.num_layers, dtype=np.int32)
    layers = np.where(experts[:, :, 0] >= 0, numbers, np.int32(-1))
    for first in range(0, steps.spec.num_layers, at_once):
        part = np.s_[:, first : first + at_once]
        progress, probabilities = steps.step(read, token, progress, layers[part], experts[part], gates[part])
    return probabilities


class _Way(Protocol):
    token: tuple[StateTensor, ...]
    progress: tuple[StateTensor, ...]
    begin_reads: tuple[int, ...]
    step_reads: tuple[int, ...]

    def begin(self, state: Sequence[Array], token_ids: Array) -> tuple[Array, ...]: ...

    def step(
        self,
        state: Sequence[Array],
        token: Sequence[Array],
        progress: Sequence[Array],
        layers: Array,
        experts: Array,
        gates: Array,
    ) -> tuple[tuple[Array, ...], Array]: ...


class _InSteps:
    """By the version's own graphs."""

    def __init__(self, speculator: Speculator) -> None:
        manifest = speculator.manifest
        self.token, self.progress = manifest.token, manifest.progress
        self.begin_graph, self.step_graph = speculator.graphs[BEGIN], speculator.graphs[STEP]
        self.begin_reads, self.step_reads = self.begin_graph.reads, self.step_graph.reads

    def begin(self, state: Sequence[Array], token_ids: Array) -> tuple[Array, ...]:
        return tuple(self.begin_graph(*state, token_ids))

    def step(
        self,
        state: Sequence[Array],
        token: Sequence[Array],
        progress: Sequence[Array],
        layers: Array,
        experts: Array,
        gates: Array,
    ) -> tuple[tuple[Array, ...], Array]:
        *after, probabilities = self.step_graph(*state, *token, *progress, layers, experts, gates)
        return tuple(after), probabilities


class _FromScratch:
    """By predict: a token is its id, and progress all that was seen, expert ids + 1 so that 0 is none."""

    def __init__(self, speculator: Speculator) -> None:
        spec = speculator.spec
        slots = (spec.num_layers, spec.top_k)
        self._predict, self._untold = speculator.graphs[PREDICT], speculator.untold
        self.token: tuple[StateTensor, ...] = (StateTensor(name="token_id", dtype="int64", shape=()),)
        self.progress: tuple[StateTensor, ...] = (
            StateTensor(name="experts", dtype="int32", shape=slots),
            StateTensor(name="gates", dtype="float32", shape=slots),
        )
        self.begin_reads: tuple[int, ...] = ()
        self.step_reads = self._predict.reads

    def begin(self, state: Sequence[Array], token_ids: Array) -> tuple[Array, ...]:
        return (token_ids,)

    def step(
        self,
        state: Sequence[Array],
        token: Sequence[Array],
        progress: Sequence[Array],
        layers: Array,
        experts: Array,
        gates: Array,
    ) -> tuple[tuple[Array, ...], Array]:
        seen, weights = (array.copy() for array in progress)
        row, place = (layers >= 0).nonzero()
        layer = layers[row, place]
        seen[row, layer] = experts[row, place] + 1
        weights[row, layer] = gates[row, place]
        untold = self._untold(len(seen))
        return (seen, weights), self._predict(*state, *token, seen - 1, weights, *untold)[0]
