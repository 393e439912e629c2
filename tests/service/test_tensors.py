"""Tensors from the wire, of every kind of number that a manifest may name.

.venv/bin/python -m pytest tests/service/test_tensors.py
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from model_store.manifest import StateTensor
from service.inference_schemas import InferInput
from service.tensors import TensorSpec, cut, read
from tests.service.inferring import DATATYPES, as_bytes, as_json

DTYPES = get_args(StateTensor.model_fields["dtype"].annotation)


def numbers(dtype: str) -> np.ndarray:
    """[2, 3] of a dtype, its extremes among them."""
    limits = np.finfo(dtype) if dtype.startswith("float") else np.iinfo(dtype)
    return np.array([[limits.min, limits.max, 0], [1, 2, 3]], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_datatype_is_called_as_the_protocol_calls_it(dtype: str) -> None:
    assert TensorSpec("x", np.dtype(dtype), (3,)).datatype == DATATYPES[dtype]


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_json_arrive_as_they_were(dtype: str, nested: bool) -> None:
    array = numbers(dtype)
    written = as_json("x", array) | ({"data": array.tolist()} if nested else {})
    came = read(InferInput(**written), None, TensorSpec("x", array.dtype, (3,)), 2)
    assert came.dtype == array.dtype
    np.testing.assert_array_equal(came, array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_arrive_as_they_were_wherever_they_lie(dtype: str) -> None:
    array = numbers(dtype)
    inputs = [InferInput(**as_bytes(name, array)) for name in "xyz"]
    # A body's bytes begin at any address.
    behind = memoryview(b"?" + array.tobytes() * 3)[1:]
    for given, part in zip(inputs, cut(inputs, behind), strict=True):
        came = read(given, part, TensorSpec(given.name, array.dtype, (3,)), 2)
        assert came.flags.aligned
        assert came.dtype == array.dtype
        np.testing.assert_array_equal(came, array)
