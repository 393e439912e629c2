"""Writes dumps of any format as one set of Parquet shards, with a progress bar: `specmoe traces import`.

specmoe traces import responses.jsonl --out traces/ --num-experts 128
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from traces.errors import TraceError
from traces.files import check_same_model, digest_of
from traces.importers.formats import Format, files_of, find
from traces.importers.told import Imported, Told
from traces.trace import UNKNOWN_DOMAIN, RoutingTrace

# Written at a time, for the sake of the progress bar.
TOKENS_AT_ONCE = 8192


def import_dumps(source: Path, out: Path, *, format_name: str | None, told: Told, domain: str | None) -> None:
    """Write `source` as Parquet shards into `out`, and print what it was and what was left out of it.

    format_name: of FORMATS; None to tell it by what is in the source. domain: of all its sequences, where it
    does not say. Raises TraceError where the source is refused; nothing is left in `out` then.
    """
    from traces.parquet import check_free

    form, dumps = find(source, format_name, told)
    check_free(out)
    files = [file for dump in dumps for file in files_of(dump)]
    provenance = {"source": source.resolve().name, "sha256": digest_of(source, files)}
    with tqdm(total=sum(map(_size, dumps)), unit="B", unit_scale=True, desc="importing", disable=None) as bar:
        recordings = (_recording(dump, form, told, domain) for dump in dumps)
        first, counts = _write(out, provenance, dumps, recordings, bar)
    spec = first.trace.spec
    print(f"{out}: {counted(counts)} of {spec.model}, {spec.num_layers} layers.")
    for line in _notes(first, counts):
        print(line)


def _write(
    out: Path, provenance: dict[str, str], dumps: list[Path], recordings: Iterator[Imported], bar: tqdm[Any]
) -> tuple[Imported, Counter[str]]:
    """One set of shards of the dumps' recordings. Returns the first of them, and what was counted in all."""
    from traces.parquet import TraceWriter

    counts: Counter[str] = Counter()
    first = next(recordings)
    form = columns(first.trace)
    with TraceWriter(out, first.trace.spec, **form, provenance=provenance) as writer:
        for dump, imported in zip(dumps, chain([first], recordings), strict=True):
            trace = imported.trace
            check_same_model(trace, dump, first.trace, dumps[0])
            _check_same_layers(imported, dump, first, dumps[0])
            before, tokens = bar.n, 0
            for piece in _pieces(trace):
                writer.append(piece)
                tokens += piece.num_tokens
                bar.update(before + _size(dump) * tokens // trace.num_tokens - bar.n)
            counts.update(imported.notes, tokens=trace.num_tokens, sequences=trace.num_sequences)
    return first, counts


def _check_same_layers(imported: Imported, dump: Path, first: Imported, first_dump: Path) -> None:
    """Raise TraceError where two dumps have as many layers with experts, but not the same ones."""
    if imported.layers != first.layers:
        raise TraceError(
            f"{dump} has routing in layers {list(imported.layers)}, {first_dump} in {list(first.layers)}.",
            remedy="Record all layers in every file, or import the files one by one.",
        )


def _recording(dump: Path, form: Format, told: Told, domain: str | None) -> Imported:
    imported = form.read(dump, told)
    if domain is None:
        return imported
    trace = imported.trace
    if set(trace.domains) != {UNKNOWN_DOMAIN}:
        raise TraceError(f"{dump} names its domains itself.", remedy="Import it without --domain.")
    return replace(imported, trace=replace(trace, domains=(domain,) * trace.num_sequences))


def _notes(first: Imported, counts: Counter[str]) -> list[str]:
    """What to tell of an import, a line for each."""
    lines = [f"{counts[reason]:,} {reason}." for reason in first.notes if counts[reason]]
    if first.dense:
        dense = ", ".join(map(str, first.dense))
        lines.append(f"Layers without routing (dense) do not count: {dense}. The others are numbered from 0.")
    return lines


def columns(trace: RoutingTrace) -> dict[str, bool]:
    return {"gates": trace.gates is not None, "token_ids": trace.token_ids is not None}


def _size(dump: Path) -> int:
    return sum(file.stat().st_size for file in files_of(dump))


def _pieces(trace: RoutingTrace) -> Iterator[RoutingTrace]:
    """Whole sequences, about TOKENS_AT_ONCE tokens at a time."""
    piece = (trace.starts[1:] - 1) // TOKENS_AT_ONCE
    for number in np.unique(piece):
        yield trace.select(np.flatnonzero(piece == number).tolist())


def counted(of: Mapping[str, int]) -> str:
    """ "13,517 tokens of 41 sequences" """
    tokens, sequences = of["tokens"], of["sequences"]
    return f"{tokens:,} token{'s' * (tokens != 1)} of {sequences:,} sequence{'s' * (sequences != 1)}"
