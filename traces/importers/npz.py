"""Reads the neutral `.npz` form of a routing trace: plain arrays, never a pickle.

experts [N, L, K] integer · starts [S + 1] integer · num_experts scalar · model scalar string
optional: gates [N, L, K] float · token_ids [N] integer · domains [S] string; other arrays are not read

specmoe traces import recording.npz --out traces/
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from traces.errors import TraceError, TraceFormatError
from traces.importers.model import spec_of
from traces.importers.packed import npy_header
from traces.trace import UNKNOWN_DOMAIN, RoutingTrace, check

REQUIRED = ("experts", "starts", "num_experts")
OPTIONAL = ("model", "gates", "token_ids", "domains")
# Uncompressed, of one array: a small file can claim any size, and is not believed beyond this.
MAX_ARRAY_BYTES = 8 << 30
Arrays = dict[str, Shaped[np.ndarray, "..."]]
KINDS = {"experts": "iu", "starts": "iu", "num_experts": "iu", "token_ids": "iu", "gates": "f"}
KIND_NAMES = {"iu": "integers", "f": "floats", "U": "strings"}

# What a damaged zip or array raises, depending on where the damage is.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)


def read(path: Path, *, model: str | None = None) -> RoutingTrace:
    """The trace in `path`. model: its name, where the file's own is missing or not wanted.

    Raises TraceFormatError where the file cannot be read, TraceError where its arrays are no routing trace.
    """
    arrays = _arrays(path)
    experts, starts = arrays["experts"], arrays["starts"]
    if experts.ndim != 3 or starts.ndim != 1 or not len(starts):
        raise TraceFormatError(
            f"{path}: experts is {list(experts.shape)} and starts {list(starts.shape)},"
            " expected [tokens, layers, top_k] and [sequences + 1].",
            remedy="Save the arrays in these shapes.",
        )
    spec = spec_of(
        path,
        model or _model_name(path, arrays),
        num_layers=experts.shape[1],
        num_experts=int(_scalar(path, arrays, "num_experts")),
        top_k=experts.shape[2],
    )
    gates, token_ids = arrays.get("gates"), arrays.get("token_ids")
    trace = RoutingTrace(
        spec=spec,
        experts=_narrowed(path, "experts", experts, np.int16),
        gates=None if gates is None else _as_float32(gates),
        token_ids=None if token_ids is None else _narrowed(path, "token_ids", token_ids, np.int32),
        starts=_narrowed(path, "starts", starts, np.int64),
        domains=_domains(path, arrays),
    )
    check(trace, str(path))
    return trace


def _arrays(path: Path) -> Arrays:
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            if missing := [name for name in REQUIRED if f"{name}.npy" not in members]:
                raise TraceFormatError(
                    f"{path}: {', '.join(missing)} missing, expected {', '.join(REQUIRED)}.",
                    remedy="Save them with numpy.savez; docs/trace-format.md tells what each means.",
                )
            return {
                name: _array(path, archive, name)
                for name in (*REQUIRED, *OPTIONAL)
                if f"{name}.npy" in members
            }
    except DAMAGE as error:
        raise TraceFormatError(
            f"{path} cannot be read as .npz: {error or type(error).__name__}.",
            remedy="Copy or record the file again; it is damaged, cut short or of another kind.",
        ) from error


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> Shaped[np.ndarray, "..."]:
    """One array, after its header was checked: kind, and no more bytes than the archive holds for it."""
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        shape, _, dtype = npy_header(file)
    kind = KINDS.get(name, "U")
    if dtype.hasobject or dtype.kind not in kind:
        raise TraceFormatError(
            f"{path}: {name} is {dtype}, expected {KIND_NAMES[kind]}.",
            remedy="Save plain arrays; pickled objects are never read.",
        )
    claimed = max(1, dtype.itemsize) * int(np.prod(shape, dtype=object))
    if claimed > min(entry.file_size, MAX_ARRAY_BYTES):
        raise TraceFormatError(
            f"{path}: {name} claims {claimed} bytes; the file holds {entry.file_size},"
            f" and {MAX_ARRAY_BYTES} is the most that is read.",
            remedy="Save the recording as several smaller files in one folder.",
        )
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _scalar(path: Path, arrays: Arrays, name: str) -> Any:
    if arrays[name].size != 1:
        raise TraceFormatError(
            f"{path}: {name} is {list(arrays[name].shape)}, expected one value.",
            remedy="Save it as a scalar.",
        )
    return arrays[name].item()


def _model_name(path: Path, arrays: Arrays) -> str:
    if "model" not in arrays:
        raise TraceFormatError(
            f"{path} does not name its model.",
            remedy="Save the array model with it, or import it under a name:"
            " specmoe traces import SOURCE --out FOLDER --model NAME.",
        )
    return str(_scalar(path, arrays, "model"))


def _narrowed(path: Path, name: str, array: Shaped[np.ndarray, "..."], dtype: type) -> Any:
    """The same integers as `dtype`, once it is sure that none of them wraps around."""
    limits = np.iinfo(dtype)
    if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        at = [int(i) for i in np.argwhere((array < limits.min) | (array > limits.max))[0]]
        raise TraceError(
            f"{path}: {name}{at} is {array[tuple(at)]}, expected {limits.min} to {limits.max}.",
            remedy="Correct the recording.",
        )
    return array.astype(dtype)


def _as_float32(gates: Shaped[np.ndarray, "..."]) -> Any:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and the check refuses it
        return gates.astype(np.float32)


def _domains(path: Path, arrays: Arrays) -> tuple[str, ...]:
    domains = arrays.get("domains")
    if domains is None:
        return (UNKNOWN_DOMAIN,) * (len(arrays["starts"]) - 1)
    if domains.shape != (len(arrays["starts"]) - 1,):
        raise TraceError(
            f"{path}: domains is {list(domains.shape)}, expected one for each of the"
            f" {len(arrays['starts']) - 1} sequences.",
            remedy="starts has one entry more than there are sequences.",
        )
    return tuple(map(str, domains))
