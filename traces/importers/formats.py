"""The formats that can be imported: which one a file is of, and what reads it.

    specmoe traces import responses.jsonl --out traces/ --format vllm --num-experts 128

A new format is a module with `read(path, told) -> Imported`, an entry in FORMATS, and its look in `_found`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from traces.errors import TraceError
from traces.files import CSV, NPZ, PARQUET, trace_files
from traces.importers import esft, fingerprint, json_records, npz, router_trace, sglang, sglang_recorder, vllm
from traces.importers.json_records import LINES
from traces.importers.told import Imported, Told

JSON, PT = ".json", ".pt"


def _read_npz(path: Path, told: Told) -> Imported:
    return Imported(npz.read(path, model=told.model))


def _read_route_trace(path: Path, told: Told) -> Imported:
    from traces.importers import route_csv  # brings pyarrow

    return route_csv.read(path, model=told.model)


def _read_moe_trace(path: Path, told: Told) -> Imported:
    from traces.importers import moe_trace

    return moe_trace.read(path, told)


@dataclass(frozen=True)
class Format:
    """what: for a list of formats. suffixes: of its files. uses: fields of Told that it makes use of."""

    what: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, Told], Imported]
    uses: frozenset[str] = frozenset()


FORMATS = {
    "npz": Format("plain NumPy arrays", (NPZ,), _read_npz),
    "route-trace": Format("BigMoeOnEdge's CSV", (CSV,), _read_route_trace),
    "vllm": Format("vLLM's API responses", (JSON, LINES), vllm.read, frozenset({"num_experts"})),
    "sglang": Format(
        "SGLang's API responses",
        (JSON, LINES),
        sglang.read,
        frozenset({"num_experts", "num_layers", "top_k"}),
    ),
    "sglang-recorder": Format("SGLang's expert distribution recorder", (PT,), sglang_recorder.read),
    "moe-trace": Format("llama.cpp's moe-trace CSV", (CSV,), _read_moe_trace, frozenset({"num_experts"})),
    "fingerprint": Format(
        "GPT-OSS-MoE-ExpertFingerprinting", (JSON, LINES), fingerprint.read, frozenset({"num_experts"})
    ),
    "router-trace": Format(
        "Megatron-LM's router trace", (LINES,), router_trace.read, frozenset({"num_experts", "micro_batch"})
    ),
    "esft": Format(
        "a folder of DeepSeek ESFT's expert logs", (), esft.read, frozenset({"num_experts", "top_k"})
    ),
}
TABLES = (NPZ, CSV)
SUFFIXES = tuple(dict.fromkeys(suffix for form in FORMATS.values() for suffix in form.suffixes))


def find(source: Path, name: str | None, told: Told) -> tuple[Format, list[Path]]:
    """The format (by its name in FORMATS, or by what is in the files) and the dumps to be read, in order.

    Raises TraceError where there is no such file, its format cannot be told, or it cannot use what was told.
    """
    name, dumps = _dumps(source, name)
    unused = [
        field.name
        for field in fields(told)
        if field.name not in {"model", *FORMATS[name].uses} and getattr(told, field.name) is not None
    ]
    if unused:
        raise TraceError(
            f"{source} is read as {name}, which has no use for {_option(unused[0])}.",
            remedy="Leave it out, or name another format.",
        )
    return FORMATS[name], dumps


def files_of(dump: Path) -> list[Path]:
    """The files that a dump is: itself, or those of a folder."""
    return [dump] if dump.is_file() else list(esft.layer_files(dump).values())


def _dumps(source: Path, name: str | None) -> tuple[str, list[Path]]:
    if source.suffix == PARQUET or (source.is_dir() and any(source.glob(f"*{PARQUET}"))):
        raise TraceError(f"{source} is in specMoE's own form already.", remedy="Use it as it is.")
    folders = esft.folders(source)
    if name == "esft" or (name is None and folders):
        if not folders:
            raise TraceError(
                f"{source} is no folder with expert_weights_N.txt in it, or in folders rank_N of it.",
                remedy=esft.RECORD_AGAIN,
            )
        return "esft", folders
    if name is not None:
        return name, trace_files(source, FORMATS[name].suffixes)
    # JSON beside arrays or tables is of something else, a summary say.
    files = trace_files(source, TABLES if _has(source, TABLES) else SUFFIXES)
    return _found(files[0]), files


def _has(source: Path, suffixes: tuple[str, ...]) -> bool:
    return source.is_dir() and any(file.suffix in suffixes for file in source.iterdir())


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _found(file: Path) -> str:
    """The format's name, by the file's extension and its first record."""
    if file.suffix == NPZ:
        return "npz"
    if file.suffix == CSV:
        from traces.importers.moe_trace import is_moe_trace

        return "moe-trace" if is_moe_trace(file) else "route-trace"
    if file.suffix == PT:
        return "sglang-recorder"
    first = next(json_records.read(file), None)
    name = None if first is None else _of_record(first.fields)
    if name is None:
        known = ", ".join(f"{name} ({form.what})" for name, form in FORMATS.items())
        raise TraceError(
            f"{file} is in none of the formats that are known by their look.",
            remedy=f"Name its format: --format with one of {known}.",
        )
    return name


def _of_record(record: dict[str, Any]) -> str | None:
    for key, name in (("router_data", "fingerprint"), ("top_indices", "router-trace")):
        if key in record:
            return name
    if sglang.is_response(record):
        return "sglang"
    return "vllm" if "choices" in record else None
