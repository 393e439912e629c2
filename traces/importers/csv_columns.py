"""Columns of numbers out of a CSV, for `route_csv` and `moe_trace`, with the line of what cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped
from pyarrow import csv

from traces.errors import TraceFormatError

# Reading takes 3.5 times a file's bytes in memory (2 million rows: 60 MB and 210 MB), so this takes 14 GiB.
MAX_BYTES = 4 << 30
MAX_LINE_BYTES = 1 << 16

Columns = dict[str, Shaped[np.ndarray, "R"]]


def check_size(path: Path, remedy: str) -> None:
    """Raise TraceFormatError where a file is too large to be read."""
    if path.stat().st_size > MAX_BYTES:
        raise TraceFormatError(
            f"{path} has {path.stat().st_size} bytes, {MAX_BYTES} at most are read.",
            remedy=f"Make files of one folder of it. {remedy}",
        )


def line(path: Path, file: IO[bytes], remedy: str) -> str:
    """The file's next line."""
    try:
        return file.readline(MAX_LINE_BYTES).decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"{path} is no text: {error}.", remedy=remedy) from error


def read(path: Path, types: Mapping[str, pa.DataType], *, names_at: int, remedy: str) -> Columns:
    """The columns of these names and types. names_at: the line of their names; 0 where there is none.

    Raises TraceFormatError naming the line where a value is not of its column's type, or there are no rows.
    """
    try:
        table = csv.read_csv(
            path,
            # Only a single thread tells the line of what it cannot read.
            csv.ReadOptions(
                use_threads=False,
                skip_rows=max(0, names_at - 1),
                column_names=None if names_at else list(types),
            ),
            csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
            csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[]),
        )
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].replace("Row #", "line ")
        raise TraceFormatError(f"{path} cannot be read: {reason[:300]}.", remedy=remedy) from error
    if not table.num_rows:
        raise TraceFormatError(f"{path} has column names but no rows.", remedy=remedy)
    return {name: table[name].to_numpy() for name in types}
