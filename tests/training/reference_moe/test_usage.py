"""Entropy of the experts' use, and what an expert tells of the domain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from training.reference_moe.usage import entropy, told_by_expert

COUNTS = arrays.arrays(np.int64, (3, 2, 5), elements=st.integers(0, 9)).filter(
    lambda c: (c.sum(-1) > 0).all()
)


def test_experts_used_alike_have_all_the_entropy_and_one_alone_none() -> None:
    assert entropy(np.array([[3.0, 3, 3, 3], [7, 0, 0, 0]])) == pytest.approx([1, 0])


def test_domains_that_share_no_expert_are_told_by_one() -> None:
    apart, alike = np.eye(4, dtype=np.int64)[:, None] * 9, np.full((4, 1, 4), 3)
    assert told_by_expert(np.concatenate([apart, alike], 1)) == pytest.approx([2, 0])


@given(COUNTS)
def test_what_is_told_is_the_mutual_information(counts: np.ndarray) -> None:
    joint = counts / counts.sum(-1, keepdims=True) / 3
    alone = joint.sum(0, keepdims=True) / 3
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nansum(joint * np.log2(joint / alone), axis=(0, 2))
    assert told_by_expert(counts) == pytest.approx(expected, abs=1e-9)


@given(COUNTS)
def test_entropy_is_a_share(counts: np.ndarray) -> None:
    assert ((entropy(counts.sum(0)) >= -1e-9) & (entropy(counts.sum(0)) <= 1 + 1e-9)).all()
