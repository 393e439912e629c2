"""Slots give what a Speculator gives that starts from scratch, in whatever order their rows are worked on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model_store.manifest import StateTensor
from speculation.errors import InputInvalid
from speculation.runtime import Speculator
from speculation.slots import Slots
from speculation.steps import Steps
from tests.speculation.replayed import Replayed
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC, toy_stored

SPECULATOR = Speculator(toy_stored(), provider="cpu")
STEPPING = Speculator(toy_stored(steps=True), provider="cpu")
LAYERS = TOY_SPEC.num_layers
CAPACITY = 4
TOLERANCE = 1e-5
SEEDS = st.integers(0, 2**32 - 1)


class Interleavings(RuleBasedStateMachine):
    """Rows of Slots, and beside each of them the same sequence from scratch."""

    speculator = SPECULATOR

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(Steps(self.speculator), CAPACITY)
        self.sequences: dict[int, Replayed] = {}

    def within_a_token(self) -> dict[int, list[int]]:
        """Rows by the layers that were told of their token."""
        rows: dict[int, list[int]] = {}
        for row, sequence in self.sequences.items():
            if sequence.started and sequence.seen < LAYERS:
                rows.setdefault(sequence.seen, []).append(row)
        return rows

    @precondition(lambda self: len(self.sequences) < CAPACITY)
    @rule()
    def open(self) -> None:
        self.sequences[self.slots.open()] = Replayed(self.speculator)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.sequences)))
        self.slots.close(row)
        del self.sequences[row]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), seed=SEEDS)
    def start(self, data: st.DataObject, seed: int) -> None:
        rows = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), min_size=1, unique=True))
        token_ids, _, _ = routed(seed, len(rows), TOY_SPEC)
        self.slots.start(np.array(rows), token_ids)
        for row, token_id in zip(rows, token_ids, strict=True):
            self.sequences[row].start(int(token_id))

    @precondition(lambda self: self.within_a_token())
    @rule(data=st.data(), seed=SEEDS, layers=st.integers(1, LAYERS), with_gates=st.booleans())
    def tell(self, data: st.DataObject, seed: int, layers: int, with_gates: bool) -> None:
        first, rows = data.draw(st.sampled_from(sorted(self.within_a_token().items())))
        end = min(first + layers, LAYERS)
        _, experts, gates = routed(seed, len(rows), TOY_SPEC, seen=LAYERS)
        experts, gates = experts[:, first:end], gates[:, first:end]
        self.slots.tell(np.array(rows), first, experts, gates if with_gates else None)
        for row, routing, weights in zip(rows, experts, gates, strict=True):
            self.sequences[row].tell(routing, weights if with_gates else None)
        if end == LAYERS:
            self.slots.advance(np.array(rows))

    @precondition(lambda self: self.within_a_token())
    @rule(data=st.data())
    def forecast(self, data: st.DataObject) -> None:
        askable = sorted(row for rows in self.within_a_token().values() for row in rows)
        rows = data.draw(st.lists(st.sampled_from(askable), min_size=1, unique=True))
        for row, probabilities in zip(rows, self.slots.forecast(np.array(rows)), strict=True):
            sequence = self.sequences[row]
            expected = sequence.probabilities()[sequence.seen :]
            np.testing.assert_allclose(probabilities[sequence.seen :], expected, atol=TOLERANCE)

    @rule()
    def keep_warm(self) -> None:
        self.slots.keep_warm()

    @invariant()
    def sequences_are_counted(self) -> None:
        assert self.slots.in_use == len(self.sequences)


class SteppingInterleavings(Interleavings):
    """The same with a version that goes step by step, a lone row in place."""

    speculator = STEPPING


for machine in (Interleavings, SteppingInterleavings):
    machine.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=40)
test_any_interleaving_is_working_it_out_from_scratch = Interleavings.TestCase
test_any_interleaving_step_by_step_is_working_it_out_from_scratch = SteppingInterleavings.TestCase


class Counting:
    """Steps that count how often each layer is taken in, and how often a token is begun."""

    spec = TOY_SPEC
    state = (StateTensor(name="unused", dtype="float32", shape=()),)
    token = (StateTensor(name="begun", dtype="float32", shape=(1,)),)
    progress = (StateTensor(name="times", dtype="float32", shape=(LAYERS, 1)),)
    begin_reads, step_reads = (), (0,)

    def __init__(self) -> None:
        self.begun = 0

    def single(self) -> None:
        return None

    def begin(self, state: Any, token_ids: np.ndarray[Any, Any]) -> Any:
        self.begun += len(token_ids)
        return (np.full((len(token_ids), 1), self.begun, np.float32),)

    def step(self, state: Any, token: Any, progress: Any, layers: Any, experts: Any, gates: Any) -> Any:
        (times,) = (array.copy() for array in progress)
        assert experts.shape == gates.shape == (*layers.shape, TOY_SPEC.top_k)
        assert ((experts < 0).all(-1) == (layers < 0)).all()
        for row, place in np.argwhere(layers >= 0):
            times[row, layers[row, place]] += 1
        return (times,), times.repeat(TOY_SPEC.num_experts, -1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=15))
def test_every_layer_is_taken_in_once_however_rows_are_batched(told: list[tuple[int, int, bool]]) -> None:
    steps = Counting()
    slots = Slots(steps, 3)  # type: ignore[arg-type]
    rows = np.array([slots.open() for _ in range(3)])
    slots.start(rows, np.zeros(3, np.int64))
    for row, layers, together in told:
        first = int(slots.seen[row])
        layers = min(layers, LAYERS - first)
        if layers:
            slots.tell(rows[row : row + 1], first, np.array([[[0, 1]] * layers]), None)
        asked = rows if together else rows[row : row + 1]
        expected = (np.arange(LAYERS) < slots.seen[asked][:, None]).astype(np.float32)
        np.testing.assert_array_equal(slots.forecast(asked)[..., 0], expected)
    slots.forecast(rows)
    assert steps.begun == 3


@pytest.mark.parametrize(("most", "sizes"), [(64, [3]), (4, [2, 1]), (1, [1, 1, 1])])
def test_many_layers_at_once_go_through_in_parts(
    monkeypatch: pytest.MonkeyPatch, most: int, sizes: list[int]
) -> None:
    monkeypatch.setattr("speculation.slots.MOST_AT_ONCE", most)
    steps, came = Counting(), []
    slots = Slots(steps, 3)  # type: ignore[arg-type]
    monkeypatch.setattr(steps, "step", lambda *told: came.append(len(told[3])) or Counting.step(steps, *told))
    rows = np.array([slots.open() for _ in range(3)])
    slots.start(rows, np.zeros(3, np.int64))
    slots.tell(rows, 0, np.array([[[0, 1]] * 2] * 3), None)
    expected = np.tile((np.arange(LAYERS) < 2).astype(np.float32), (3, 1))
    np.testing.assert_array_equal(slots.forecast(rows)[..., 0], expected)
    assert came == sizes


class Sizing(Steps):
    """Notes how many sequences a call has."""

    def __init__(self, speculator: Speculator) -> None:
        super().__init__(speculator)
        self.sizes: list[tuple[str, int]] = []

    def advance(self, state: Any, token_ids: Any, experts: Any, gates: Any) -> tuple[Any, ...]:
        self.sizes.append(("advance", len(token_ids)))
        return super().advance(state, token_ids, experts, gates)

    def begin(self, state: Any, token_ids: Any) -> tuple[Any, ...]:
        self.sizes.append(("begin", len(token_ids)))
        return super().begin(state, token_ids)


@pytest.mark.parametrize("speculator", [SPECULATOR, STEPPING], ids=["from scratch", "in steps"])
def test_many_sequences_finish_and_begin_a_token_in_parts(
    monkeypatch: pytest.MonkeyPatch, speculator: Speculator
) -> None:
    monkeypatch.setattr("speculation.slots.MOST_AT_ONCE", 2)
    steps = Sizing(speculator)
    slots = Slots(steps, 4)
    rows = np.array([slots.open() for _ in range(4)])
    token_ids, experts, gates = routed(4, 4, TOY_SPEC, seen=LAYERS)
    slots.start(rows, token_ids)
    slots.tell(rows, 0, experts, gates)
    slots.advance(rows)
    slots.start(rows, token_ids[::-1])
    came = slots.forecast(rows)
    for number, probabilities in enumerate(came):
        expected = Replayed(speculator)
        expected.start(int(token_ids[number]))
        expected.tell(experts[number], gates[number])
        expected.start(int(token_ids[3 - number]))
        np.testing.assert_allclose(probabilities, expected.probabilities(), atol=TOLERANCE)
    assert steps.sizes == [("advance", 2)] * 2 + [("begin", 2)] * 2


@pytest.fixture
def slots() -> Slots:
    return Slots(Steps(SPECULATOR), CAPACITY)


def test_a_row_that_is_used_again_remembers_nothing(slots: Slots) -> None:
    token_ids, experts, gates = routed(1, 1, TOY_SPEC, seen=LAYERS)
    row = np.array([slots.open()])
    slots.start(row, token_ids)
    slots.forecast(row)
    slots.tell(row, 0, experts, gates)
    slots.advance(row)
    slots.close(int(row[0]))
    again = np.array([slots.open()])
    slots.start(again, token_ids)
    fresh = Replayed(SPECULATOR)
    fresh.start(int(token_ids[0]))
    assert again.tolist() == row.tolist()
    np.testing.assert_allclose(slots.forecast(again)[0], fresh.probabilities(), atol=TOLERANCE)


def test_a_forecast_that_is_asked_for_again_is_the_same(slots: Slots) -> None:
    row = np.array([slots.open()])
    slots.start(row, np.array([7]))
    slots.tell(row, 0, np.array([[[0, 1], [2, 3]]]), None)
    np.testing.assert_array_equal(slots.forecast(row), slots.forecast(row))


def test_history_may_come_from_elsewhere(slots: Slots) -> None:
    token_ids, experts, gates = routed(2, 3, TOY_SPEC, seen=LAYERS)
    row, expected = np.array([slots.open()]), Replayed(SPECULATOR)
    for token in range(3):
        one = slice(token, token + 1)
        slots.advance_with(row, token_ids[one], experts[one].astype(np.uint8), gates[one])
        expected.start(int(token_ids[token]))
        expected.tell(experts[token], gates[token])
    slots.start(row, np.array([-1]))
    expected.start()
    np.testing.assert_allclose(slots.forecast(row)[0], expected.probabilities(), atol=TOLERANCE)


def test_a_finished_token_is_given_as_it_was_told(slots: Slots) -> None:
    _, experts, gates = routed(3, 1, TOY_SPEC, seen=LAYERS)
    row = np.array([slots.open()])
    slots.start(row, np.array([7]))
    slots.tell(row, 0, experts, gates)
    token_id, told_experts, told_gates = slots.finished(int(row[0]))
    slots.start(row, np.array([8]))
    slots.tell(row, 0, 7 - experts, None)
    assert token_id == 7
    np.testing.assert_array_equal(told_experts, experts[0])
    np.testing.assert_array_equal(told_gates, gates[0])


def test_more_sequences_than_there_is_room_for_are_refused(slots: Slots) -> None:
    assert sorted(slots.open() for _ in range(CAPACITY)) == list(range(CAPACITY))
    with pytest.raises(InputInvalid, match="4 sequences are open, and no more are allowed"):
        slots.open()
