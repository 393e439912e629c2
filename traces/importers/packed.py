"""Integer arrays that come as base64 text: a whole .npy file, or bare bytes.

No shape is believed that the bytes do not fill, and nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import io
import tokenize
import warnings
from typing import IO, Any

import numpy as np
from jaxtyping import Shaped

READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is in Fortran's order, and dtype; the file stands at the data. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version not in READ_HEADER:
        raise ValueError(f"array format {version} is unknown")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers of Python 2, which a damaged one may look like
            return READ_HEADER[version](file)
    except (SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"the array's header is damaged ({error})") from error


def unpack_npy(text: str) -> Shaped[np.ndarray, "..."]:
    """The integers in base64 of a .npy file. Raises ValueError telling what is wrong with them."""
    data = unpack(text)
    file = io.BytesIO(data)
    shape, fortran, dtype = npy_header(file)
    if dtype.kind not in "iu":
        raise ValueError(f"the array is {dtype}, expected integers")
    claimed, held = dtype.itemsize * int(np.prod(shape, dtype=object)), len(data) - file.tell()
    if claimed != held:
        raise ValueError(f"the array claims to be {list(shape)}, {claimed} bytes, but {held} bytes are there")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def unpack(text: str) -> bytes:
    """The bytes in base64. Raises ValueError where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64 ({error})") from error
