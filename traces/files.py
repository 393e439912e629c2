"""Opens any routing trace: picks the reader by the file's extension, and tells a trace's digest.

`load` is the one door through which recorded routing enters the project; what comes out of it was checked.

    specmoe traces info recording.npz
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from traces.errors import TraceError
from traces.importers import npz
from traces.trace import RoutingTrace, concatenate


def _read_parquet(path: Path, *, hidden: bool = False) -> RoutingTrace:
    from traces import parquet

    return parquet.read_with_hidden(path) if hidden else parquet.read(path)


def _read_route_csv(path: Path) -> RoutingTrace:
    from traces.importers import route_csv

    return route_csv.read(path).trace


# pyarrow is only imported where it reads: .npz needs numpy alone.
NPZ, CSV, PARQUET = ".npz", ".csv", ".parquet"
READERS: dict[str, Callable[[Path], RoutingTrace]] = {
    NPZ: npz.read,
    CSV: _read_route_csv,
    PARQUET: _read_parquet,
}


def load(path: Path, *, hidden: bool = False) -> RoutingTrace:
    """The trace in a file, or in a folder of files of one kind (put together in name order), checked.

    hidden: with the hidden states, where Parquet shards have some.

    Raises TraceError (TraceFormatError where a file cannot be read at all) with file, row and reason.
    """
    files = trace_files(path)
    if files[0].suffix == PARQUET:  # its shards belong together
        return _read_parquet(path, hidden=hidden)
    traces = [READERS[file.suffix](file) for file in files]
    for file, trace in zip(files, traces, strict=True):
        check_same_model(trace, file, traces[0], files[0])
    return concatenate(traces)


def check_same_model(trace: RoutingTrace, file: Path, first: RoutingTrace, first_file: Path) -> None:
    """Raise TraceError where a file's trace does not go with that of the first one of its folder."""
    if trace.spec != first.spec:
        raise TraceError(
            f"{file} is of {trace.spec}, but {first_file} of {first.spec}.",
            remedy="Keep each model's traces in a folder of their own.",
        )
    if (trace.gates is None) != (first.gates is None):
        with_gates, without = (first_file, file) if trace.gates is None else (file, first_file)
        raise TraceError(
            f"{with_gates} has gates, {without} has none.",
            remedy="Keep traces with and without gates in folders of their own.",
        )


def trace_files(path: Path, suffixes: Collection[str] = tuple(READERS)) -> list[Path]:
    """The trace files of a folder in name order, or the one file itself; all of one kind.

    Raises TraceError where there is none, its extension is unknown, or a folder mixes kinds.
    """
    if not path.exists():
        raise TraceError(f"{path} does not exist.", remedy="Check the path.")
    if path.is_file():
        if path.suffix not in suffixes:
            raise TraceError(
                f"{path} has extension {path.suffix!r}, expected {', '.join(suffixes)}.",
                remedy="Import it: specmoe traces import. docs/importing.md tells what it reads.",
            )
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        raise TraceError(
            f"{path} has {' and '.join(kinds) if kinds else 'no'} trace files, expected one kind of"
            f" {', '.join(suffixes)}.",
            remedy="Give a folder with trace files of one kind.",
        )
    return files


def digest(path: Path) -> str:
    """sha256 of a trace, in hex: of the file, or of a folder's trace files in name order."""
    return digest_of(path, trace_files(path))


def digest_of(path: Path, files: Sequence[Path]) -> str:
    """sha256 of the file, or of these files of a folder, in hex.

    A folder's is what `sha256sum FILES | sha256sum` prints inside of it, so that anyone can check it.
    """
    if path.is_file():
        return _sha256(path)
    listing = "".join(f"{_sha256(file)}  {file.relative_to(path)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
