"""Tensors as the Open Inference Protocol writes them: numbers in JSON, or bytes behind it.

InferRequest, the bytes behind it -> `cut` -> `read` -> arrays -> `service.inference`

.venv/bin/python -m pytest tests/service/test_tensors.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from service.errors import RequestInvalid
from service.explain import came, shown
from service.inference_schemas import InferInput

Array = np.ndarray[Any, Any]

# What the protocol calls numpy's kinds of numbers; the bits follow.
_KINDS = {"f": "FP", "i": "INT", "u": "UINT"}
METADATA_REMEDY = "GET /v2/models/{model} tells every input's datatype and shape."


class TensorSpec(NamedTuple):
    """What a version's predict takes or gives. `shape`: without the leading batch axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """The protocol's name of the numbers: FP16, FP32, INT64, UINT8."""
        return f"{_KINDS[self.dtype.kind]}{8 * self.dtype.itemsize}"


def cut(inputs: Sequence[InferInput], behind: memoryview) -> list[memoryview | None]:
    """The bytes behind the JSON, cut as the inputs say and in their order; None for one whose data is JSON.

    Raises RequestInvalid where they do not add up.
    """
    sizes = [given.parameters.binary_data_size if given.parameters else None for given in inputs]
    total = sum(size or 0 for size in sizes)
    if total != len(behind):
        raise RequestInvalid(
            f"The inputs' binary_data_size are {total} bytes together, but {len(behind)} follow the JSON.",
            remedy="Say the JSON's length in Inference-Header-Content-Length, and each input's bytes in its "
            "parameters.",
        )
    parts: list[memoryview | None] = []
    begin = 0
    for size in sizes:
        parts.append(None if size is None else behind[begin : begin + size])
        begin += size or 0
    return parts


def read(given: InferInput, part: memoryview | None, wanted: TensorSpec, batch: int) -> Array:
    """An input as the array that predict takes. part: its bytes, None where its data is in the JSON.

    Raises RequestInvalid where it is not `wanted`.
    """
    shape = (batch, *wanted.shape)
    if given.datatype != wanted.datatype or tuple(given.shape) != shape:
        raise RequestInvalid(
            f"{given.name} is {shown(given.datatype)} {shown(str(given.shape))}, "
            f"expected {wanted.datatype} {list(shape)}.",
            remedy=f"{METADATA_REMEDY} The first axis is the batch, the same for all inputs.",
        )
    if (given.data is None) == (part is None):
        has = "neither data nor" if part is None else "both data and"
        raise RequestInvalid(
            f"{given.name} has {has} binary_data_size, expected one of them.",
            remedy="Write the numbers into data, or their bytes behind the JSON.",
        )
    return _of_json(given, wanted, shape) if part is None else _of_bytes(part, wanted, shape)


def _of_bytes(part: memoryview, wanted: TensorSpec, shape: tuple[int, ...]) -> Array:
    """From little-endian bytes. Copied: where they lie in the body is no multiple of anything."""
    expected = math.prod(shape) * wanted.dtype.itemsize
    if len(part) != expected:
        raise RequestInvalid(
            f"{wanted.name} has a binary_data_size of {len(part)}, expected {expected}: "
            f"{wanted.datatype} {list(shape)}.",
            remedy="Send its numbers little-endian, in row-major order, without gaps.",
        )
    return np.frombuffer(part, wanted.dtype.newbyteorder("<")).astype(wanted.dtype).reshape(shape)


def _of_json(given: InferInput, wanted: TensorSpec, shape: tuple[int, ...]) -> Array:
    values = _flattened(given.data or [], shape)
    if values is None or len(values) != math.prod(shape):
        raise RequestInvalid(
            f"{wanted.name} has data that is not of its shape {list(shape)}, {math.prod(shape)} numbers.",
            remedy="Write them in row-major order, flat or nested as the shape says.",
        )
    return _numbers(values, wanted).reshape(shape)


def _flattened(values: list[Any], shape: tuple[int, ...]) -> list[Any] | None:
    """In one row; None where lists within lists are not as the shape says."""
    if not values or type(values[0]) is not list:
        return values
    for size in shape[1:]:
        if any(type(row) is not list or len(row) != size for row in values):
            return None
        values = list(chain.from_iterable(values))
    return values


def _numbers(values: list[Any], wanted: TensorSpec) -> Array:
    """Checked one by one: numpy would take true for 1, "5" for 5 and cut 1.5 down to 1."""
    whole = wanted.dtype.kind != "f"
    for kind in set(map(type, values)) - ({int} if whole else {int, float}):
        odd = next(value for value in values if type(value) is kind)
        raise _odd(wanted, odd, "a whole number" if whole else "a number")
    if not whole:
        return _floats(values, wanted)
    limits = np.iinfo(wanted.dtype)
    for value in (min(values), max(values)):
        if not limits.min <= value <= limits.max:
            raise _odd(wanted, value, f"{limits.min} to {limits.max}")
    return np.array(values, wanted.dtype)


def _floats(values: list[float], wanted: TensorSpec) -> Array:
    """What is too large for the dtype becomes infinite, as it would in bytes."""
    try:
        wide = np.array(values, np.float64)
    except OverflowError:  # an integer beyond any float
        raise _odd(wanted, max(values, key=abs), f"a number that fits into {wanted.datatype}") from None
    with np.errstate(over="ignore"):
        return wide.astype(wanted.dtype)


def _odd(wanted: TensorSpec, value: Any, expected: str) -> RequestInvalid:
    return RequestInvalid(
        f"{wanted.name} has {came(value)} in its data, expected {expected}.", remedy=METADATA_REMEDY
    )
