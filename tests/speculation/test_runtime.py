"""A Speculator: pure functions of what goes in, and careful about what may."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.errors import ChecksumMismatch, VersionNotFound
from model_store.store import open_store
from speculation.errors import GoldenMismatch, InputInvalid, ProviderUnavailable
from speculation.runtime import LARGEST_KEPT_BATCH, LARGEST_KEPT_STATE, Speculator, load_speculator
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC, toy_store, toy_stored, toy_version

SPECULATOR = Speculator(toy_stored(), provider="cpu")
SEEDS = st.integers(0, 2**32 - 1)
BATCHES = st.integers(1, 6)


def advanced(seed: int, batch: int, tokens: int = 2):
    """A state after some tokens."""
    state = SPECULATOR.initial_state(batch)
    for token in range(tokens):
        state = SPECULATOR.advance(state, *routed(seed + token, batch, TOY_SPEC, seen=TOY_SPEC.num_layers))
    return state


def rows(state, row):
    return tuple(array[row : row + 1] for array in state)


@settings(deadline=None, max_examples=30)
@given(SEEDS, BATCHES)
def test_a_batch_predicts_as_its_rows_do(seed, batch):
    state, (token_ids, experts, gates) = advanced(seed, batch), routed(seed, batch, TOY_SPEC)
    together = SPECULATOR.predict(state, token_ids, experts, gates)
    for row in range(batch):
        one = slice(row, row + 1)
        alone = SPECULATOR.predict(rows(state, row), token_ids[one], experts[one], gates[one])
        np.testing.assert_allclose(together[one], alone, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(SEEDS, BATCHES)
def test_a_batch_advances_as_its_rows_do(seed, batch):
    state, routing = advanced(seed, batch), routed(seed, batch, TOY_SPEC, seen=TOY_SPEC.num_layers)
    together = SPECULATOR.advance(state, *routing)
    for row in range(batch):
        one = slice(row, row + 1)
        alone = SPECULATOR.advance(rows(state, row), *(array[one] for array in routing))
        for whole, part in zip(together, alone, strict=True):
            np.testing.assert_allclose(whole[one], part, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_the_same_question_has_the_same_answer_and_changes_nothing(seed):
    state, routing = advanced(seed, 2), routed(seed, 2, TOY_SPEC)
    before = [array.copy() for array in (*state, *routing)]
    first, again = (SPECULATOR.predict(state, *routing) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for array, kept in zip((*state, *routing), before, strict=True):
        np.testing.assert_array_equal(array, kept)


@settings(deadline=None, max_examples=30)
@given(SEEDS, BATCHES, st.sampled_from([0.25, 1.0, 7.0]))
def test_unknown_gates_are_equal_gates_of_any_scale(seed, batch, scale):
    state, (token_ids, experts, gates) = advanced(seed, batch), routed(seed, batch, TOY_SPEC)
    unknown = SPECULATOR.predict(state, token_ids, experts, None)
    equal = SPECULATOR.predict(state, token_ids, experts, np.full_like(gates, scale))
    np.testing.assert_allclose(unknown, equal, atol=1e-6)


@pytest.mark.parametrize("batch", [1, LARGEST_KEPT_BATCH, LARGEST_KEPT_BATCH + 1])
def test_no_token_ids_are_unknown_token_ids(batch):
    state, (_, experts, gates) = advanced(1, batch), routed(1, batch, TOY_SPEC)
    none = SPECULATOR.predict(state, None, experts, gates)
    unknown = SPECULATOR.predict(state, np.full(batch, -1), experts, gates)
    np.testing.assert_array_equal(none, unknown)


def test_predictions_depend_on_everything_that_goes_in():
    state, (token_ids, experts, gates) = advanced(1, 1), routed(1, 1, TOY_SPEC, seen=2)
    usual = SPECULATOR.predict(state, token_ids, experts, gates)
    for other in (
        (advanced(2, 1), token_ids, experts, gates),
        (state, token_ids + 1, experts, gates),
        (state, token_ids, routed(2, 1, TOY_SPEC, seen=2)[1], gates),
        (state, token_ids, experts, gates[..., ::-1].copy()),
    ):
        assert np.abs(SPECULATOR.predict(*other) - usual)[:, 2:].max() > 1e-3


def test_a_state_is_what_the_manifest_declares():
    state = SPECULATOR.initial_state(3)
    assert [(a.dtype.name, a.shape) for a in state] == [("float32", (3, 4, 8)), ("int32", (3, 1))]
    assert not any(array.any() for array in state)


@pytest.mark.parametrize("batch", [1, 3, LARGEST_KEPT_STATE + 1])
def test_no_state_is_the_initial_one(batch):
    routing = routed(5, batch, TOY_SPEC)
    expected = SPECULATOR.predict(SPECULATOR.initial_state(batch), *routing)
    for _ in range(2):
        np.testing.assert_array_equal(SPECULATOR.predict(None, *routing), expected)
    SPECULATOR.advance(SPECULATOR.initial_state(batch), *routed(5, batch, TOY_SPEC, seen=TOY_SPEC.num_layers))
    np.testing.assert_array_equal(SPECULATOR.predict(None, *routing), expected)


def test_an_advanced_state_is_a_state_again():
    assert [(a.dtype, a.shape) for a in advanced(1, 3)] == [
        (a.dtype, a.shape) for a in SPECULATOR.initial_state(3)
    ]


def replaced(array, index, value):
    copy = array.copy()
    copy[index] = value
    return copy


STATE = SPECULATOR.initial_state(2)
TOKEN_IDS, EXPERTS, GATES = routed(3, 2, TOY_SPEC, seen=2)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (
            (STATE, TOKEN_IDS, EXPERTS.astype(np.int64), GATES),
            r"experts is int64 \[2, 4, 2\], expected int32 \[2, 4, 2\]",
        ),
        ((STATE, TOKEN_IDS, EXPERTS[0], GATES), r"experts is int32 \[4, 2\], expected int32 \[4, 4, 2\]"),
        (
            (STATE, TOKEN_IDS, EXPERTS[:, :3], GATES),
            r"experts is int32 \[2, 3, 2\], expected int32 \[2, 4, 2\]",
        ),
        ((STATE, TOKEN_IDS, EXPERTS[:0], GATES), r"experts is int32 \[0, 4, 2\], expected int32 \[1, 4, 2\]"),
        ((STATE, TOKEN_IDS, EXPERTS.tolist(), GATES), r"experts is list, expected int32 \[1, 4, 2\]"),
        ((STATE, TOKEN_IDS, None, GATES), r"experts is NoneType"),
        ((STATE, TOKEN_IDS, np.int32(3), GATES), r"experts is int32"),
        (
            (STATE, TOKEN_IDS, replaced(EXPERTS, (1, 0, 1), 8), GATES),
            r"experts\[1, 0, 1\] is 8, expected -1 to 7",
        ),
        (
            (STATE, TOKEN_IDS, replaced(EXPERTS, (0, 3, 0), -2), GATES),
            r"experts\[0, 3, 0\] is -2, expected -1 to 7",
        ),
        (
            (STATE, TOKEN_IDS, replaced(EXPERTS, (1, 1, 0), -1), GATES),
            r"experts\[1, 1\] is .* in some of its slots",
        ),
        ((STATE, TOKEN_IDS, replaced(EXPERTS, (1, 3, 1), 5), GATES), r"experts\[1, 3\] is \[-1, 5\]"),
        ((STATE, TOKEN_IDS, EXPERTS, GATES.astype(np.float64)), r"gates is float64 .*, expected float32"),
        (
            (STATE, TOKEN_IDS, EXPERTS, GATES[:1]),
            r"gates is float32 \[1, 4, 2\], expected float32 \[2, 4, 2\]",
        ),
        (
            (STATE, TOKEN_IDS, EXPERTS, replaced(GATES, (0, 1, 1), np.nan)),
            r"gates\[0, 1, 1\] is nan, expected a finite",
        ),
        (
            (STATE, TOKEN_IDS, EXPERTS, replaced(GATES, (0, 3, 1), np.nan)),
            r"gates\[0, 3, 1\] is nan, expected a finite",
        ),
        (
            (STATE, TOKEN_IDS, EXPERTS, replaced(GATES, (0, 1, 1), np.inf)),
            r"gates\[0, 1, 1\] is inf, expected a finite",
        ),
        (
            (STATE, TOKEN_IDS, EXPERTS, replaced(GATES, (0, 1, 1), -1)),
            r"gates\[0, 1, 1\] is -1.0, expected a finite",
        ),
        (
            (STATE, TOKEN_IDS, EXPERTS, replaced(GATES, (0, 1), 0)),
            r"gates\[0, 1\] are all 0 in a layer that was seen",
        ),
        (
            (STATE, TOKEN_IDS.astype(np.int32), EXPERTS, GATES),
            r"token_ids is int32 \[2\], expected int64 \[2\]",
        ),
        ((STATE, TOKEN_IDS[:1], EXPERTS, GATES), r"token_ids is int64 \[1\], expected int64 \[2\]"),
        ((STATE[:1], TOKEN_IDS, EXPERTS, GATES), r"state has 1 arrays, expected 2.*initial_state"),
        (
            ((STATE[0], STATE[1][:1]), TOKEN_IDS, EXPERTS, GATES),
            r"state last_token is int32 \[1, 1\], expected",
        ),
        (
            (STATE[::-1], TOKEN_IDS, EXPERTS, GATES),
            r"state average is int32 \[2, 1\], expected float32 \[2, 4, 8\]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("function", ["predict", "advance"])
def test_what_is_no_input_is_refused_with_what_came(function, inputs, reason):
    with pytest.raises(InputInvalid, match=reason):
        getattr(SPECULATOR, function)(*inputs)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_gates_of_layers_not_seen_are_ignored(value):
    usual = SPECULATOR.predict(STATE, TOKEN_IDS, EXPERTS, GATES)
    other = SPECULATOR.predict(STATE, TOKEN_IDS, EXPERTS, replaced(GATES, np.s_[:, 2:], value))
    np.testing.assert_array_equal(usual, other)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_cannot_run(threads):
    with pytest.raises(InputInvalid, match=f"threads is {threads}"):
        Speculator(toy_stored(), threads=threads)


def test_auto_takes_a_provider_that_works():
    automatic = Speculator(toy_stored())
    assert automatic.provider in ("cpu", "cuda")
    np.testing.assert_allclose(
        automatic.predict(STATE, TOKEN_IDS, EXPERTS, GATES),
        SPECULATOR.predict(STATE, TOKEN_IDS, EXPERTS, GATES),
        atol=2e-3,
    )


def test_a_provider_nobody_knows_is_refused():
    with pytest.raises(ProviderUnavailable, match="There is no provider 'tpu'"):
        Speculator(toy_stored(), provider="tpu")


@pytest.mark.skipif(Speculator(toy_stored()).provider == "cuda", reason="CUDA works here")
def test_cuda_where_there_is_none_is_an_error_and_not_a_noise(capfd):
    with pytest.raises(ProviderUnavailable, match=r"The provider cuda does not work here.*choose cpu"):
        Speculator(toy_stored(), provider="cuda")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("version", "number"), [(None, 2), ("production", 2), (1, 1), ("1", 1)])
def test_a_version_is_loaded_by_number_or_alias(tmp_path, version, number):
    assert load_speculator("toy", version=version, store=toy_store(tmp_path)).manifest.version == number


def test_a_store_may_be_given_open_or_by_its_place(tmp_path):
    root = toy_store(tmp_path)
    for store in (root, str(root), open_store(root)):
        assert load_speculator("toy", store=store, provider="cpu").spec == TOY_SPEC


def test_loading_refuses_what_the_store_refuses(tmp_path):
    root = toy_store(tmp_path)
    (root / "toy" / "1" / "predict.onnx").write_bytes(b"x")
    with pytest.raises(ChecksumMismatch):
        load_speculator("toy", version=1, store=root)
    with pytest.raises(VersionNotFound):
        load_speculator("toy", version=9, store=root)


def test_loading_refuses_a_version_that_answers_otherwise(tmp_path):
    draft, graphs = toy_version()
    other = toy_version(bias=0.5)[0]
    open_store(tmp_path).publish(draft.model_copy(update={"golden": other.golden}), graphs)
    with pytest.raises(GoldenMismatch):
        load_speculator("toy", store=tmp_path)
