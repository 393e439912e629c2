"""Ranking against a naive sort, for arrays of any shape and with ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from speculation.errors import InputInvalid
from speculation.ranking import expected_recall, rank
from traces.spec import MAX_EXPERTS

PROBABILITIES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=1, max_dims=4, max_side=40),
    # Few values, so that many are equal, and the odd ones of a float.
    elements=st.one_of(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 1e-45]), st.floats(0, 1, width=32)),
)


def naive(row: np.ndarray, n: int) -> list[int]:
    return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:n]


@settings(deadline=None)
@given(PROBABILITIES, st.data())
def test_ranking_is_a_naive_sort(probabilities, data):
    n = data.draw(st.integers(1, probabilities.shape[-1]))
    experts, ranked = rank(probabilities, n)
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    assert experts.reshape(-1, n).tolist() == [naive(row, n) for row in rows]
    np.testing.assert_array_equal(ranked, np.take_along_axis(probabilities, experts, axis=-1))


@pytest.mark.parametrize("num_experts", [512, MAX_EXPERTS])
@pytest.mark.parametrize("n", [1, 8, 500])
def test_ranking_holds_for_many_experts(num_experts, n):
    probabilities = np.random.default_rng(n).random((2, num_experts)).astype(np.float32).round(2)
    assert rank(probabilities, n)[0].tolist() == [naive(row, n) for row in probabilities]


def test_ranking_leaves_its_input_alone():
    probabilities = np.random.default_rng(0).random((2, 3, 64)).astype(np.float32)
    before = probabilities.copy()
    rank(probabilities, 4)
    np.testing.assert_array_equal(probabilities, before)


def test_ranking_takes_any_float():
    assert rank(np.array([0.1, 0.9, 0.5]), 2)[0].tolist() == [1, 2]


@pytest.mark.parametrize("n", [0, -1, 9])
def test_an_impossible_number_of_experts_is_refused(n):
    with pytest.raises(InputInvalid, match=f"{n} experts of a layer were asked for, expected 1 to 8"):
        rank(np.zeros(8, np.float32), n)


def test_expected_recall_is_the_listed_probability_over_k():
    np.testing.assert_allclose(expected_recall(np.array([[0.9, 0.5], [0.2, 0.1]]), 2), [0.7, 0.15])


def test_expected_recall_is_never_above_one():
    assert expected_recall(np.array([0.9, 0.9, 0.9]), 2) == 1.0


def test_expected_recall_is_the_recall_that_happens():
    """Draw the routed experts from the probabilities themselves: the mean recall is the expected one."""
    rng = np.random.default_rng(5)
    probabilities = rng.dirichlet(np.ones(8)).astype(np.float32)
    experts, ranked = rank(probabilities, 3)
    happened = np.isin(rng.choice(8, size=20_000, p=probabilities / probabilities.sum()), experts).mean()
    assert abs(expected_recall(ranked, 1) - happened) < 0.02
