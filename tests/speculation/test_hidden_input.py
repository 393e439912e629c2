"""A version that reads a hidden state: told, not told, refused; and one that reads none is as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest

from model_store.documents import written
from model_store.manifest import PREDICT
from speculation.errors import GoldenMismatch, GraphRefused, InputInvalid
from speculation.golden import check_golden
from speculation.runtime import Speculator
from speculation.sequence import Sequence
from speculation.steps import Steps, step_through
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC, toy_stored, with_graphs

SIZE = 6
READS = Speculator(toy_stored(steps=True, hidden_size=SIZE), provider="cpu")
READS_NONE = Speculator(toy_stored(steps=True), provider="cpu")
TOLD = np.linspace(-1, 3, 2 * SIZE, dtype=np.float32).reshape(2, SIZE)


def logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(probabilities / (1 - probabilities))


def test_what_is_told_counts_and_zeros_are_as_nothing() -> None:
    question = (READS.initial_state(2), *routed(1, 2, TOY_SPEC, seen=2))
    untold = READS.predict(*question)
    assert np.array_equal(untold, READS.predict(*question, np.zeros((2, SIZE), np.float32)))
    assert np.array_equal(untold, READS_NONE.predict(*question))
    told = READS.predict(*question, TOLD)
    expected = logits(untold) + TOLD.mean(-1)[:, None, None]
    np.testing.assert_allclose(logits(told), expected, atol=1e-3)


def test_steps_say_what_predict_says_without_one() -> None:
    question = (READS.initial_state(2), *routed(1, 2, TOY_SPEC, seen=2))
    for version in (READS, Speculator(toy_stored(hidden_size=SIZE), provider="cpu")):
        stepped = step_through(Steps(version), *question, at_once=1)
        np.testing.assert_allclose(stepped, READS.predict(*question), atol=1e-5)
        check_golden(version)


@pytest.mark.parametrize(
    ("hidden", "told"),
    [
        (TOLD[:1], r"hidden is float32 \[1, 6\], expected float32 \[2, 6\]"),
        (TOLD.astype(np.float16), r"hidden is float16 \[2, 6\], expected float32 \[2, 6\]"),
        (TOLD.tolist(), "hidden is list"),
        (np.full_like(TOLD, np.nan), "not finite"),
    ],
    ids=["batch", "half precision", "list", "not a number"],
)
def test_what_cannot_be_one_is_refused(hidden: np.ndarray, told: str) -> None:
    with pytest.raises(InputInvalid, match=told):
        READS.predict(READS.initial_state(2), *routed(1, 2, TOY_SPEC, seen=2), hidden)


def test_a_version_that_reads_none_says_so() -> None:
    with pytest.raises(InputInvalid, match=r"reads no hidden state\. Leave it out"):
        READS_NONE.predict(READS_NONE.initial_state(2), *routed(1, 2, TOY_SPEC, seen=2), TOLD)
    assert READS_NONE.untold(2) == ()


def test_a_manifest_without_one_does_not_speak_of_it() -> None:
    assert "hidden_size" not in json.loads(written(READS_NONE.manifest))
    assert json.loads(written(READS.manifest))["hidden_size"] == SIZE


def test_graph_and_manifest_must_agree() -> None:
    stored = toy_stored(hidden_size=SIZE)
    deaf = with_graphs(stored, {PREDICT: toy_stored().graphs[PREDICT]})
    with pytest.raises(GraphRefused, match=r"has the inputs .*, expected .*hidden"):
        Speculator(deaf, provider="cpu")


def test_a_version_that_hears_something_else_fails_its_golden_check() -> None:
    stored = toy_stored(hidden_size=SIZE)
    golden = READS.predict(READS.initial_state(1), *routed(1, 1, TOY_SPEC, seen=2))[0]
    rows = tuple(tuple(map(float, row)) for row in golden)
    with pytest.raises(GoldenMismatch):
        check_golden(Speculator(toy_stored(hidden_size=SIZE, golden=rows), provider="cpu"))
    check_golden(Speculator(stored, provider="cpu"))


def test_a_sequence_tells_the_last_layers_and_keeps_it_for_the_next_tokens_start() -> None:
    ids, experts, gates = routed(3, 2, TOY_SPEC, seen=TOY_SPEC.num_layers)
    sequence = Sequence(READS)
    sequence.start_token(int(ids[0]))
    for layer in range(TOY_SPEC.num_layers):
        sequence.observe(experts[0, layer], gates[0, layer], TOLD[0] + layer)
    sequence.start_token(int(ids[1]))
    state = READS.advance(READS.initial_state(1), ids[:1], experts[:1], gates[:1])
    unseen = np.full_like(experts[1:], -1)
    last = TOLD[:1] + TOY_SPEC.num_layers - 1
    for seen in range(2):
        expected = READS.predict(state, ids[1:], unseen, gates[1:], last)[0]
        for forecast in sequence.forecast():
            np.testing.assert_allclose(
                forecast.probabilities, expected[forecast.layer][forecast.experts], atol=1e-6
            )
        if not seen:  # the next layer comes without: what was told before is too old
            sequence.observe(experts[1, 0], gates[1, 0])
            unseen[:, 0] = experts[1, 0]
            last = np.zeros_like(last)


def test_a_sequence_refuses_what_it_cannot_tell_and_keeps_nothing_of_that_layer() -> None:
    for version, hidden in ((READS_NONE, TOLD[0]), (READS, TOLD), (READS, TOLD[0] * np.inf)):
        sequence = Sequence(version)
        sequence.start_token()
        with pytest.raises(InputInvalid):
            sequence.observe([0, 1], None, hidden)
        assert sequence.seen == 0
