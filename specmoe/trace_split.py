"""Writes the parts of a split as folders of Parquet shards: `specmoe traces split`.

specmoe traces split recording.npz --out parts --validation 0.1 --test 0.1
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from specmoe.trace_import import columns, counted
from traces.files import PARQUET, check_same_model, digest, load, trace_files
from traces.split import HELD_OUT, families, split
from traces.trace import RoutingTrace, concatenate

MAX_DOMAINS_SHOWN = 20


def split_traces(
    sources: Sequence[Path],
    out: Path,
    *,
    validation: float,
    test: float,
    hold_out: Collection[str],
    seed: int,
) -> None:
    """Write the parts of all sources together below `out`, and print what is in each. Options as of `split`.

    All sources are held in memory. Raises TraceError where one is refused or they are of different models;
    nothing is left in `out` then.
    """
    from traces.parquet import check_free

    check_free(out)
    recordings = [load(source) for source in sources]
    for source, recording in zip(sources, recordings, strict=True):
        check_same_model(recording, source, recordings[0], sources[0])
    trace = concatenate(recordings)
    parts = split(trace, validation=validation, test=test, hold_out=hold_out, seed=seed)
    provenance = {
        "source": ", ".join(source.resolve().name for source in sources),
        "sha256": ", ".join(digest(source) for source in sources),
        "split": f"validation {validation}, test {test}, seed {seed}",
        "held_out": ", ".join(sorted(set(hold_out))),
    }
    _write(parts, out, provenance)
    for line in _summary(trace, parts, out):
        print(line)
    if any(map(_has_hidden, sources)):
        print("Hidden states were left out.")


def _write(parts: Mapping[str, RoutingTrace], out: Path, provenance: Mapping[str, str]) -> None:
    """All parts or, where one fails, none."""
    from traces.parquet import TraceWriter

    made = not out.exists()
    try:
        for name, part in parts.items():
            of_part = {**provenance, "part": name}
            form = {**columns(part), "prefill": part.prefill is not None}
            with TraceWriter(out / name, part.spec, **form, provenance=of_part) as writer:
                writer.append(part)
    except BaseException:
        for name in parts:  # nothing of others: `out` was empty
            shutil.rmtree(out / name, ignore_errors=True)
        if made:
            with suppress(OSError):
                out.rmdir()
        raise


def _has_hidden(source: Path) -> bool:
    file = trace_files(source)[0]
    if file.suffix != PARQUET:
        return False
    from traces.shard import Shard

    return Shard(file).hidden_size > 0


def _summary(trace: RoutingTrace, parts: Mapping[str, RoutingTrace], out: Path) -> list[str]:
    shared = sum(part.num_tokens for name, part in parts.items() if name != HELD_OUT)
    lines = []
    for name, part in parts.items():
        count = counted({"tokens": part.num_tokens, "sequences": part.num_sequences})
        share = "" if name == HELD_OUT else f" ({part.num_tokens / shared:.1%})"
        lines.append(f"{out / name}: {count}{share}: {_domains(part)}")
    twins = trace.num_sequences - len(families(trace))
    if twins:
        lines.append(f"Sequences that repeat another one, and are in the same part: {twins:,}.")
    return lines


def _domains(part: RoutingTrace) -> str:
    """ "mmlu_test 6,006, mmlu_dev 1,827" in tokens"""
    tokens: Counter[str] = Counter()
    for domain, length in zip(part.domains, np.diff(part.starts).tolist(), strict=True):
        tokens[domain] += length
    shown = ", ".join(f"{domain} {count:,}" for domain, count in tokens.most_common(MAX_DOMAINS_SHOWN))
    more = len(tokens) - MAX_DOMAINS_SHOWN
    return shown + (f" and {more:,} domains more" if more > 0 else "")
