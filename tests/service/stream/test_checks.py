"""Few numbers are checked by Python, many by numpy: with the same result.

.venv/bin/python -m pytest tests/service/stream/test_checks.py
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.errors import MessageInvalid
from service.stream.checks import FEW, check_experts, check_gates, check_token_ids
from tests.toy_version import TOY_SPEC

ENOUGH = FEW // TOY_SPEC.top_k + 1
pair = st.lists(st.integers(0, 9), min_size=2, max_size=2)
gate = st.floats(width=32) | st.sampled_from([0.0, 1e-45, 1e30, float(np.nextafter(np.float32(1e30), 2e30))])


def refusal(check: Any, values: np.ndarray[Any, Any], *more: Any) -> str | None:
    try:
        check(values, *more)
    except MessageInvalid as error:
        return error.message
    return None


@given(pair, st.integers(0, ENOUGH - 1), st.sampled_from([np.uint8, np.uint16, np.int32]))
def test_experts_are_refused_alike_among_few_and_among_many(slots: list[int], layer: int, dtype: Any) -> None:
    few = np.array([[slots]], dtype)
    many = np.tile(np.array([[[0, 1]]], dtype), (1, ENOUGH, 1))
    many[0, layer] = slots
    told = refusal(check_experts, few, TOY_SPEC)
    assert (told is None) == (len(set(slots)) == 2 and max(slots) < TOY_SPEC.num_experts)
    assert refusal(check_experts, many, TOY_SPEC) == (told and told.replace("[0][0]", f"[0][{layer}]", 1))


@given(st.lists(gate, min_size=2, max_size=2), st.integers(0, ENOUGH - 1))
@example([1e30, 1.0], 0)
@example([1e-45, 0.0], 0)
@example([1.0, math.nan], 0)
@example([math.nan, 1.0], 0)
@example([math.inf, 1.0], 0)
@example([-0.0, 0.0], 0)
def test_gates_are_refused_alike_among_few_and_among_many(slots: list[float], layer: int) -> None:
    weights = np.array(slots, np.float32)
    few, many = weights[None, None], np.ones((1, ENOUGH, 2), np.float32)
    many[0, layer] = weights
    told = refusal(check_gates, few)
    in_range = all(0.0 <= weight <= float(np.float32(1e30)) for weight in weights.tolist())
    assert (told is None) == (in_range and max(weights.tolist()) > 0.0)
    assert refusal(check_gates, many) == (told and told.replace("[0][0]", f"[0][{layer}]", 1))


@pytest.mark.parametrize("token_id", [-2, -(2**31)])
def test_a_token_id_below_unknown_is_named(token_id: int) -> None:
    check_token_ids(np.array([-1, 0, 2**31 - 1]))
    with pytest.raises(MessageInvalid, match=rf"token_ids\[1\] is {token_id}, expected -1"):
        check_token_ids(np.array([0, token_id]))
