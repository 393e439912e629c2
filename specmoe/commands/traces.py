"""Import routing traces of other forms, split them, and tell what is in one and how predictable it is.

    specmoe traces import recording.npz --out traces/
    specmoe traces import recording.route.csv --out traces/ --model qwen3-30b-a3b --domain chat
    specmoe traces import responses.jsonl --out traces/ --num-experts 128
    specmoe traces split traces/ --out parts --validation 0.1 --test 0.1 --hold-out law
    specmoe traces info traces/ --json info.json

Traces are .npz files, route-trace .csv files, folders of either, and folders of Parquet shards, which is what
import and split write: docs/trace-format.md. What else can be imported: docs/importing.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from specmoe.trace_import import columns, counted, import_dumps
from specmoe.trace_split import split_traces
from traces.errors import TraceError
from traces.files import digest, load
from traces.importers.formats import FORMATS
from traces.importers.told import Told
from traces.statistics import temporal_locality, usage_entropy
from traces.trace import RoutingTrace

# Whole sequences are split: every fifth scores what the baselines learn from the four before it.
EVERY_FIFTH = 5
# A sample keeps this to seconds. On gpt-oss-20b its recalls are within .03 of those of three times as much.
MAX_FITTED_TOKENS = 20_000
MAX_SCORED_TOKENS = 2_000
DISTANCES = ("start", "1", "4")
MAX_DOMAINS_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|split|info")
    importing = actions.add_parser("import", help="write a recording as a folder of Parquet shards")
    importing.add_argument("source", type=Path, metavar="SOURCE", help="a file, or a folder of one kind")
    importing.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new or empty; nothing is overwritten"
    )
    importing.add_argument("--model", metavar="NAME", help="call the model so, whatever the source calls it")
    importing.add_argument(
        "--domain", metavar="NAME", help="where the prompts came from, if the source does not say"
    )
    known = "; ".join(f"{name}: {form.what}" for name, form in FORMATS.items())
    importing.add_argument(
        "--format",
        choices=FORMATS,
        metavar="NAME",
        help=f"what the source is, if its look does not say: {known}",
    )
    importing.add_argument(
        "--num-experts", type=int, metavar="E", help="routed experts of a layer, if the source does not say"
    )
    importing.add_argument(
        "--num-layers", type=int, metavar="D", help="layers of the model, dense ones too (sglang)"
    )
    importing.add_argument(
        "--top-k", type=int, metavar="K", help="experts that a token is routed to, if the source does not say"
    )
    importing.add_argument(
        "--micro-batch",
        type=int,
        metavar="B",
        help="the source is training with B sequences a pass (router-trace)",
    )
    _add_split(actions.add_parser("split", help="share sequences out to train, validation and test"))
    info = actions.add_parser("info", help="tell what a trace holds and how predictable it is")
    info.add_argument("path", type=Path, metavar="PATH", help="a trace file, or a folder of them")
    info.add_argument("--json", type=Path, metavar="OUT", help="write the same as JSON there")


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE", help="a trace file, or a folder of them"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new or empty; nothing is overwritten"
    )
    for part in ("validation", "test"):
        parser.add_argument(
            f"--{part}",
            type=float,
            default=0.1,
            metavar="SHARE",
            help=f"of the tokens, for {part}; 0 for none (default 0.1)",
        )
    parser.add_argument(
        "--hold-out",
        nargs="+",
        action="extend",
        default=[],
        metavar="DOMAIN",
        help="put all sequences of these domains apart, into FOLDER/held-out",
    )
    parser.add_argument("--seed", type=int, default=0, help="another one, another split (default 0)")


def run(args: argparse.Namespace) -> int:
    try:
        if args.action == "import":
            told = Told(args.model, args.num_experts, args.num_layers, args.top_k, args.micro_batch)
            import_dumps(args.source, args.out, format_name=args.format, told=told, domain=args.domain)
        elif args.action == "split":
            split_traces(
                args.sources,
                args.out,
                validation=args.validation,
                test=args.test,
                hold_out=args.hold_out,
                seed=args.seed,
            )
        else:
            _info(args.path, args.json)
    except OSError as error:
        file = error.filename or vars(args).get("out", "A file")
        raise TraceError(
            f"{file} cannot be read or written: {error.strerror or error}.",
            remedy="Check permissions and free space.",
        ) from error
    return 0


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
        **columns(trace),
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
            f"{counted(info)} of {length['shortest']:,} to"
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
        f"fitted on {counted(fitted)}, scored on {counted(scored)} held out",
    ]


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
