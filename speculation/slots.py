"""Many sequences at once, each a row of preallocated arrays: what a service holds for its streams.

Steps -> Slots: open, start, tell, forecast, advance, close, each for a whole batch of rows.

The arrays are as large as the most sequences allowed, but the system gives memory only for rows that were
used. Inputs are trusted: whoever took them in has checked them.

slots = Slots(Steps(load_speculator("gpt-oss-20b")), capacity=1024)
row = np.array([slots.open()])
slots.start(row, np.array([976]))
probabilities = slots.forecast(row)  # [1, L, E]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from speculation.errors import InputInvalid
from speculation.single import NO_LAYER, Single
from speculation.steps import Steps
from traces.spec import RoutingSpec

Array = np.ndarray[Any, Any]
Rows: TypeAlias = Int64[np.ndarray, "n"]
# No row.
NOBODY = -1
# Layers told that go through a step at once, of all its sequences together, and sequences that begin or
# finish a token at once. Each takes 40 kB or more while it runs, and the system does not get all of it back:
# 250 sequences that tell 12 layers would need 100 MB.
MOST_AT_ONCE = 32
# layers, experts and gates, as `Steps.step` takes them
Told: TypeAlias = tuple[Int32[np.ndarray, "n M"], Int32[np.ndarray, "n M K"], Float32[np.ndarray, "n M K"]]


class Slots:
    """State, current token and routing of up to `capacity` sequences.

    seen: layers told of the current token.
    """

    def __init__(self, steps: Steps, capacity: int) -> None:
        self.steps = steps
        self.spec: RoutingSpec = steps.spec
        spec = self.spec
        self._state = [np.zeros((capacity, *t.shape), t.dtype) for t in steps.state]
        self._token = [np.zeros((capacity, *t.shape), t.dtype) for t in steps.token]
        self._progress = [np.zeros((capacity, *t.shape), t.dtype) for t in steps.progress]
        self._begin_state = [self._state[index] for index in steps.begin_reads]
        self._step_state = [self._state[index] for index in steps.step_reads]
        routed = (capacity, spec.num_layers, spec.top_k)
        self._token_ids = np.zeros(capacity, np.int64)
        self._experts = np.zeros(routed, np.uint8 if spec.num_experts <= 256 else np.int16)
        self._gates = np.zeros(routed, np.float32)
        # A row that is worked on alone is copied there and back, once until another one is.
        self._single = steps.single()
        self._alone = NOBODY
        self._nobodys = steps.single()
        self._stepped = False
        self._turn = 0
        self._begun = np.zeros(capacity, bool)
        # Layers that are in `_progress` already; those from there to `seen` are told, but not worked in yet.
        self._worked_in = np.zeros(capacity, np.int32)
        self.seen = np.zeros(capacity, np.int32)
        self._free = list(range(capacity - 1, -1, -1))
        self._layer_numbers = np.arange(spec.num_layers, dtype=np.int32)
        none = (1, 1, spec.top_k)
        self._nothing_told: Told = (
            np.full(none[:2], -1, np.int32),
            np.full(none, -1, np.int32),
            np.ones(none, np.float32),
        )

    @property
    def in_use(self) -> int:
        """Sequences that are open."""
        return len(self._begun) - len(self._free)

    def open(self) -> int:
        """A row for a sequence of which nothing has happened yet. Raises InputInvalid where none is free."""
        if not self._free:
            raise InputInvalid(
                f"{self.in_use} sequences are open, and no more are allowed.", remedy="Close some first."
            )
        row = self._free.pop()
        for array in self._state:
            array[row] = 0
        self._alone = NOBODY
        return row

    def close(self, row: int) -> None:
        """Forget a sequence; its row may be another one's from now on."""
        self._free.append(row)

    def start(self, rows: Rows, token_ids: Int64[np.ndarray, "n"]) -> None:
        """Begin a token of each of these sequences. token_ids: -1 where unknown."""
        at = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows
        self._token_ids[at] = token_ids
        self._begun[at] = False
        self._worked_in[at] = 0
        self.seen[at] = 0

    def tell(
        self,
        rows: Rows,
        first_layer: int,
        experts: Integer[np.ndarray, "n m K"],
        gates: Float32[np.ndarray, "n m K"] | None,
    ) -> None:
        """The next m layers' routing, the same layers for all of them. gates: None where unknown."""
        end = first_layer + experts.shape[1]
        if len(rows) == 1:  # plain indices are written three times as fast as an array of them
            row = rows[0]
            self._experts[row, first_layer:end] = experts[0]
            self._gates[row, first_layer:end] = 1.0 if gates is None else gates[0]
            self.seen[row] = end
            return
        self._experts[rows, first_layer:end] = experts
        self._gates[rows, first_layer:end] = 1.0 if gates is None else gates
        self.seen[rows] = end

    def forecast(self, rows: Rows) -> Float32[np.ndarray, "n L E"]:
        """Probabilities of every layer; those of layers that were told mean nothing."""
        if self._single and len(rows) == 1:
            row = int(rows[0])
            if self.seen[row] - self._worked_in[row] <= 1:
                return self._forecast_alone(self._single, row)
        self._alone = NOBODY
        begun = self._begun[rows]
        if not begun.all():
            self._begin(rows[~begun])
        columns = int(self.seen[rows].max() - self._worked_in[rows].min())
        parts = _parts(rows, max(1, MOST_AT_ONCE // max(1, columns)))
        if len(parts) == 1:
            return self._forecast_together(rows)
        return np.concatenate([self._forecast_together(part) for part in parts])

    def keep_warm(self) -> None:
        """Run one of the graphs, each in its turn, so that they stay in the processor's caches."""
        nobodys = self._nobodys
        if not nobodys:
            return
        self._turn = (self._turn + 1) % 3
        if self._turn == 0:
            nobodys.begin(-1)
        elif self._turn == 1:
            nobodys.advance(-1, np.arange(self.spec.top_k), 1.0)
        else:
            if not self._stepped:
                nobodys.step(NO_LAYER, NO_LAYER, 1.0)
            self._stepped = False

    def finished(self, row: int) -> tuple[int, Array, Array]:
        """(id, experts [L, K], gates [L, K]) of the current token, copied: its row will be overwritten."""
        return int(self._token_ids[row]), self._experts[row].copy(), self._gates[row].copy()

    def advance(self, rows: Rows) -> None:
        """Make the current token of each of these sequences history; all its layers must have been told."""
        for part in _parts(rows, MOST_AT_ONCE):
            self.advance_with(part, self._token_ids[part], self._experts[part], self._gates[part])

    def advance_with(
        self,
        rows: Rows,
        token_ids: Int64[np.ndarray, "n"],
        experts: Integer[np.ndarray, "n L K"],
        gates: Float32[np.ndarray, "n L K"],
    ) -> None:
        """Make a finished token history that is not the current one."""
        if self._single and len(rows) == 1:
            row = int(rows[0])
            self._take(self._single, row).advance(int(token_ids[0]), experts[0], gates[0])
            _put_one(self._state, row, self._single.state)
            return
        self._alone = NOBODY
        after = self.steps.advance(_taken(self._state, rows), token_ids, experts.astype(np.int32), gates)
        _put(self._state, rows, after)

    def routing(self, row: int) -> Integer[np.ndarray, "L K"]:
        """What was told of the current token."""
        told: Integer[np.ndarray, "L K"] = self._experts[row]
        return told

    def _forecast_together(self, rows: Rows) -> Float32[np.ndarray, "n L E"]:
        """As `forecast`, of sequences whose token has begun."""
        layers, experts, gates = self._told(rows)
        progress, probabilities = self.steps.step(
            _taken(self._step_state, rows),
            _taken(self._token, rows),
            _taken(self._progress, rows),
            layers,
            experts,
            gates,
        )
        _put(self._progress, rows, progress)
        self._worked_in[rows] = self.seen[rows]
        return probabilities

    def _forecast_alone(self, single: Single, row: int) -> Float32[np.ndarray, "1 L E"]:
        """As `forecast`, of one sequence that was told one layer, or none, since the last one."""
        self._take(single, row)
        if not self._begun[row]:
            single.begin(int(self._token_ids[row]))
            _put_one(self._token, row, single.token)
            self._begun[row] = True
        self._stepped = True
        layer = self._worked_in[row]
        if layer == self.seen[row]:
            probabilities = single.step(NO_LAYER, NO_LAYER, 1.0)
        else:
            probabilities = single.step(layer, self._experts[row, layer], self._gates[row, layer])
        _put_one(self._progress, row, single.progress)
        self._worked_in[row] = self.seen[row]
        return probabilities.copy()

    def _take(self, single: Single, row: int) -> Single:
        """This row's sequence, where calls cost least."""
        if row != self._alone:
            self._alone = row
            for copies, arrays in (
                (single.state, self._state),
                (single.token, self._token),
                (single.progress, self._progress),
            ):
                for copy, array in zip(copies, arrays, strict=True):
                    copy[0] = array[row]
        return single

    def _begin(self, rows: Rows) -> None:
        for part in _parts(rows, MOST_AT_ONCE):
            token = self.steps.begin(_taken(self._begin_state, part), self._token_ids[part])
            _put(self._token, part, token)
        for array in self._progress:
            array[rows] = 0
        self._begun[rows] = True

    def _told(self, rows: Rows) -> Told:
        """The layers told since the last forecast, padded to the longest, with at least one column."""
        first, end = self._worked_in[rows], self.seen[rows]
        start, stop = int(first.min()), int(end.max())
        if start == stop:
            layers, experts, gates = self._nothing_told
            return layers.repeat(len(rows), 0), experts.repeat(len(rows), 0), gates.repeat(len(rows), 0)
        experts = self._experts[rows, start:stop].astype(np.int32)
        gates = self._gates[rows, start:stop]
        layers = self._layer_numbers[None, start:stop].repeat(len(rows), 0)
        told = (layers >= first[:, None]) & (layers < end[:, None])
        if not told.all():
            experts[~told] = -1
            gates[~told] = 1.0
            layers[~told] = -1
        return layers, experts, gates


def _parts(rows: Rows, at_once: int) -> list[Rows]:
    return [rows[first : first + at_once] for first in range(0, len(rows), at_once)]


def _taken(arrays: Sequence[Array], rows: Rows) -> tuple[Array, ...]:
    """The rows of each array; of one row a view, which costs nothing."""
    if len(rows) == 1:
        row = rows[0]
        return tuple(array[row : row + 1] for array in arrays)
    return tuple(array.take(rows, axis=0) for array in arrays)


def _put_one(arrays: Sequence[Array], row: int, values: Sequence[Array]) -> None:
    for array, value in zip(arrays, values, strict=True):
        array[row] = value[0]


def _put(arrays: Sequence[Array], rows: Rows, values: Sequence[Array]) -> None:
    if len(rows) == 1:
        row = rows[0]
        for array, value in zip(arrays, values, strict=True):
            array[row] = value[0]
        return
    for array, value in zip(arrays, values, strict=True):
        array[rows] = value
