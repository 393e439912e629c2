"""Import routing traces of other forms, and tell what is in one and how predictable it is.

    specmoe traces import recording.npz --out traces/
    specmoe traces import recording.route.csv --out traces/ --model qwen3-30b-a3b --domain chat
    specmoe traces info traces/ --json info.json

Traces are .npz files, route-trace .csv files, folders of either, and folders of Parquet shards, which is what
import writes. docs/trace-format.md describes them all.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from traces.errors import TraceError
from traces.files import NPZ, PARQUET, check_same_model, digest, load, trace_files
from traces.importers import npz
from traces.spec import RoutingSpec
from traces.statistics import temporal_locality, usage_entropy
from traces.trace import UNKNOWN_DOMAIN, RoutingTrace

# Written at a time, for the sake of the progress bar.
TOKENS_AT_ONCE = 8192
# Whole sequences are split: every fifth scores what the baselines learn from the four before it.
EVERY_FIFTH = 5
# A sample keeps this to seconds. On gpt-oss-20b its recalls are within .03 of those of three times as much.
MAX_FITTED_TOKENS = 20_000
MAX_SCORED_TOKENS = 2_000
DISTANCES = ("start", "1", "4")
MAX_DOMAINS_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|info")
    importing = actions.add_parser("import", help="write a recording as a folder of Parquet shards")
    importing.add_argument(
        "source", type=Path, metavar="SOURCE", help="an .npz or .csv file, or a folder of them"
    )
    importing.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new or empty; nothing is overwritten"
    )
    importing.add_argument("--model", metavar="NAME", help="call the model so, whatever the source calls it")
    importing.add_argument(
        "--domain", metavar="NAME", help="where the prompts came from, if the source does not say"
    )
    info = actions.add_parser("info", help="tell what a trace holds and how predictable it is")
    info.add_argument("path", type=Path, metavar="PATH", help="a trace file, or a folder of them")
    info.add_argument("--json", type=Path, metavar="OUT", help="write the same as JSON there")


def run(args: argparse.Namespace) -> int:
    try:
        if args.action == "import":
            _import(args.source, args.out, args.model, args.domain)
        else:
            _info(args.path, args.json)
    except OSError as error:
        file = error.filename or vars(args).get("out", "A file")
        raise TraceError(
            f"{file} cannot be read or written: {error.strerror or error}.",
            remedy="Check permissions and free space.",
        ) from error
    return 0


def _import(source: Path, out: Path, model: str | None, domain: str | None) -> None:
    from traces.parquet import check_free

    files = trace_files(source)
    if files[0].suffix == PARQUET:
        raise TraceError(f"{source} is in specMoE's own form already.", remedy="Use it as it is.")
    check_free(out)
    provenance = {"source": source.resolve().name, "sha256": digest(source)}
    with tqdm(total=sum(map(_size, files)), unit="B", unit_scale=True, desc="importing", disable=None) as bar:
        recordings = (_recording(file, model, domain) for file in files)
        spec, counts = _write(out, provenance, files, recordings, bar)
    print(f"{out}: {_counted(counts)} of {spec.model}.")
    if counts["left_out"]:
        print(f"{counts['left_out']:,} prompt tokens were left out: the recorder has no last layer of them.")


def _write(
    out: Path, provenance: dict[str, str], files: list[Path], recordings: Iterator[_Recording], bar: tqdm[Any]
) -> tuple[RoutingSpec, Counter[str]]:
    """One set of shards of the files' recordings. Returns their spec, and how many tokens and sequences."""
    from traces.parquet import TraceWriter

    counts: Counter[str] = Counter()
    first = next(recordings)
    form = _columns(first.trace)
    with TraceWriter(out, first.trace.spec, **form, provenance=provenance) as writer:
        for file, (trace, left_out) in zip(files, chain([first], recordings), strict=True):
            check_same_model(trace, file, first.trace, files[0])
            before, tokens = bar.n, 0
            for piece in _pieces(trace):
                writer.append(piece)
                tokens += piece.num_tokens
                bar.update(before + _size(file) * tokens // trace.num_tokens - bar.n)
            counts.update(tokens=trace.num_tokens, sequences=trace.num_sequences, left_out=left_out)
    return first.trace.spec, counts


class _Recording(NamedTuple):
    """left_out: tokens of the file that are not in the trace."""

    trace: RoutingTrace
    left_out: int


def _recording(file: Path, model: str | None, domain: str | None) -> _Recording:
    trace, left_out = _read(file, model)
    if domain is None:
        return _Recording(trace, left_out)
    if set(trace.domains) != {UNKNOWN_DOMAIN}:
        raise TraceError(f"{file} names its domains itself.", remedy="Import it without --domain.")
    return _Recording(replace(trace, domains=(domain,) * trace.num_sequences), left_out)


def _read(file: Path, model: str | None) -> tuple[RoutingTrace, int]:
    if file.suffix == NPZ:
        return npz.read(file, model=model), 0
    from traces.importers import route_csv

    imported = route_csv.read(file, model=model)
    return imported.trace, imported.left_out


def _columns(trace: RoutingTrace) -> dict[str, bool]:
    return {"gates": trace.gates is not None, "token_ids": trace.token_ids is not None}


def _size(file: Path) -> int:
    return file.stat().st_size


def _pieces(trace: RoutingTrace) -> Iterator[RoutingTrace]:
    """Whole sequences, about TOKENS_AT_ONCE tokens at a time."""
    piece = (trace.starts[1:] - 1) // TOKENS_AT_ONCE
    for number in np.unique(piece):
        yield trace.select(np.flatnonzero(piece == number).tolist())


def _info(path: Path, out: Path | None) -> None:
    trace = load(path)
    document = _describe(trace) | {"sha256": digest(path), "baselines": _baselines(trace)}
    print(_text(path, document))
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _describe(trace: RoutingTrace) -> dict[str, Any]:
    lengths = np.diff(trace.starts)
    tokens: Counter[str] = Counter()
    for domain, length in zip(trace.domains, lengths.tolist(), strict=True):
        tokens[domain] += length
    sequences = Counter(trace.domains)
    locality = temporal_locality(trace)
    return {
        "model": trace.spec.model,
        "num_layers": trace.spec.num_layers,
        "num_experts": trace.spec.num_experts,
        "top_k": trace.spec.top_k,
        **_columns(trace),
        "tokens": trace.num_tokens,
        "sequences": trace.num_sequences,
        "decoded_tokens": None if trace.prefill is None else int((~trace.prefill).sum()),
        "sequence_tokens": {
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        },
        "domains": {
            domain: {"sequences": sequences[domain], "tokens": count}
            for domain, count in tokens.most_common()
        },
        "usage_entropy": usage_entropy(trace).tolist(),
        "temporal_locality": None if locality is None else locality.tolist(),
    }


def _baselines(trace: RoutingTrace) -> dict[str, Any] | None:
    """Recall of the plain baselines, fitted on four of five sequences and scored on the fifth.

    None where there are not five sequences: a split within one would flatter whatever remembers it.
    """
    if trace.num_sequences < EVERY_FIFTH:
        return None
    from training.baselines import BASELINES
    from training.evaluate import score_baseline

    number = np.arange(trace.num_sequences)
    scoring = number % EVERY_FIFTH == EVERY_FIFTH - 1
    fitted = _some(trace.select(number[~scoring].tolist()), MAX_FITTED_TOKENS)
    scored = _some(trace.select(number[scoring].tolist()), MAX_SCORED_TOKENS)
    recall = {}
    for name, baseline in tqdm(BASELINES.items(), desc="baselines", leave=False, disable=None):
        scores = score_baseline(baseline().fit(fitted), scored).distances()
        recall[name] = {
            distance: {key: scores[distance][key] for key in ("recall_at_k", "recall_at_2k")}
            for distance in DISTANCES
            if distance in scores
        }
    return {"fitted": _counts(fitted), "scored": _counts(scored), "recall": recall}


def _counts(trace: RoutingTrace) -> dict[str, int]:
    return {"tokens": trace.num_tokens, "sequences": trace.num_sequences}


def _some(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """Evenly spaced sequences with about so many tokens together, one at least."""
    count = max(1, min(trace.num_sequences, round(trace.num_sequences * tokens / trace.num_tokens)))
    return trace.select(np.linspace(0, trace.num_sequences - 1, count).astype(int).tolist())


def _text(path: Path, info: dict[str, Any]) -> str:
    given = [name.replace("_", " ") for name in ("token_ids", "gates") if info[name]]
    length = info["sequence_tokens"]
    return "\n".join(
        [
            f"{path}: {info['model']}, {info['num_layers']} layers x {info['num_experts']} experts,"
            f" top-{info['top_k']}, with {' and '.join(given) or 'neither token ids nor gates'}",
            f"{_counted(info)} of {length['shortest']:,} to"
            f" {length['longest']:,} tokens (median {length['median']:,.0f})",
            *_decoded_lines(info),
            f"sha256 {info['sha256']}",
            "",
            *_domain_lines(info["domains"]),
            "",
            *_layer_lines(info),
            "",
            *_baseline_lines(info),
        ]
    )


def _decoded_lines(info: dict[str, Any]) -> list[str]:
    decoded = info["decoded_tokens"]
    return [] if decoded is None else [f"{decoded:,} of the tokens were decoded, the others read together"]


def _domain_lines(domains: dict[str, dict[str, int]]) -> list[str]:
    rows = [[name, f"{of['sequences']:,}", f"{of['tokens']:,}"] for name, of in domains.items()]
    hidden = len(rows) - MAX_DOMAINS_SHOWN
    more = [f"and {hidden:,} domains more"] if hidden > 0 else []
    return _table(["domain", "sequences", "tokens"], rows[:MAX_DOMAINS_SHOWN]) + more


def _layer_lines(info: dict[str, Any]) -> list[str]:
    entropy, locality = info["usage_entropy"], info["temporal_locality"] or [None] * info["num_layers"]
    columns = [("mean", np.mean(entropy), None if None in locality else np.mean(locality))]
    columns += [(str(layer), *values) for layer, values in enumerate(zip(entropy, locality, strict=True))]
    rows = [[name, _share(uneven), _share(again)] for name, uneven, again in columns]
    return [
        *_table(["layer", "usage entropy", "temporal locality"], rows),
        "usage entropy: 1 where all experts are used equally often, 0 where always the same one is",
        "temporal locality: share of routed experts that the previous token was routed to as well"
        f" ({info['top_k'] / info['num_experts']:.3f} by chance)",
    ]


def _baseline_lines(info: dict[str, Any]) -> list[str]:
    baselines, top_k = info["baselines"], info["top_k"]
    if baselines is None:
        return [
            f"No baselines: they are fitted and scored on whole sequences, {EVERY_FIFTH} at least,"
            f" and here are {info['sequences']}."
        ]
    fitted, scored = baselines["fitted"], baselines["scored"]
    recall = baselines["recall"]
    distances = list(next(iter(recall.values())))
    rows = [
        [name, *(f"{of[d]['recall_at_k']:.3f} / {of[d]['recall_at_2k']:.3f}" for d in distances)]
        for name, of in recall.items()
    ]
    return [
        *_table([f"recall@{top_k} / recall@{2 * top_k}", *map(_ahead, distances)], rows),
        f"fitted on {_counted(fitted)}, scored on {_counted(scored)} held out",
    ]


def _counted(of: Mapping[str, int]) -> str:
    """ "13,517 tokens of 41 sequences" """
    tokens, sequences = of["tokens"], of["sequences"]
    return f"{tokens:,} token{'s' * (tokens != 1)} of {sequences:,} sequence{'s' * (sequences != 1)}"


def _ahead(distance: str) -> str:
    return "token start" if distance == "start" else f"{distance} ahead"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    pads = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True))
        for row in (header, *rows)
    ]
