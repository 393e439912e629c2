"""Score a version, as it would be served, on traces it never saw.

    specmoe evaluate gpt-oss-20b --traces test.npz
    specmoe evaluate gpt-oss-20b@candidate --traces test.npz --json scores.json
    specmoe evaluate gpt-oss-20b@2 --traces test.npz --report report --baselines --train-traces train.npz

Runs the ONNX graphs over every sequence, token by token and layer by layer, and compares each forecast with
what the router did. docs/evaluation.md tells what each number means.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from model_store.manifest import Manifest
from speculation.runtime import load_speculator
from traces.files import digest, load
from traces.spec import RoutingSpec
from traces.trace import concatenate
from training.baselines import BASELINES, Baseline
from training.errors import EvaluationError, check_same_shape
from training.evaluate import evaluate
from training.report import (
    adaptation_table,
    baseline_table,
    cache_table,
    distance_table,
    few_distances,
    summary,
    write_json,
    write_report,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL[@VERSION]", help="VERSION: a number or an alias (production)")
    parser.add_argument("--traces", type=Path, required=True, metavar="FILE|FOLDER", help="what to score on")
    parser.add_argument("--store", metavar="LOCATION", help="folder or s3://bucket/prefix (the bundled one)")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--every", type=_positive, default=1, metavar="N", help="score one token in N (1)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers there")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write Markdown, JSON and pictures there"
    )
    parser.add_argument("--baselines", action="store_true", help="score the plain baselines too")
    parser.add_argument(
        "--cache", action="store_true", help="simulate what a cache keeps, by policy and size"
    )
    parser.add_argument(
        "--adapt", action="store_true", help="score coverage sets that learn from their misses, too"
    )
    parser.add_argument(
        "--train-traces",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="what the baselines learn from",
    )


def run(args: argparse.Namespace) -> int:
    if args.baselines != bool(args.train_traces):
        raise EvaluationError(
            "--baselines and --train-traces came without each other.",
            remedy="Baselines learn from training traces: give both, or neither.",
        )
    model, version = model_and_version(args.model)
    speculator = load_speculator(model, version=version, store=args.store, provider=args.provider)
    trace = load(args.traces, hidden=bool(speculator.manifest.hidden_size))
    name = f"{model} version {speculator.manifest.version}"
    check_same_shape(trace.spec, speculator.spec, name)
    sha256 = digest(args.traces)
    _warn(trace.spec, sha256, speculator.manifest, name)
    result = evaluate(
        speculator,
        trace,
        baselines=_fitted(args.train_traces),
        every=args.every,
        cache=args.cache,
        adapt=args.adapt,
        progress=sys.stderr.isatty(),
    )
    document = result.document()
    document["trace"] |= {"name": args.traces.name, "sha256": sha256}
    _show(document)
    if args.json:
        write_json(document, args.json)
    if args.report:
        write_report(document, args.report)
    return 0


def model_and_version(text: str) -> tuple[str, int | str | None]:
    model, at, version = text.partition("@")
    if at and not version:
        raise EvaluationError(
            f"{text!r} names no version.", remedy="Write MODEL, MODEL@2 or MODEL@production."
        )
    return model, int(version) if version.isdecimal() else version or None


def _warn(trace: RoutingSpec, sha256: str, manifest: Manifest, name: str) -> None:
    """What makes the scores less than they seem, said where it cannot be overlooked."""
    if trace.model != manifest.spec.model:
        print(f"specmoe: the traces are of {trace.model}, not of {manifest.spec.model}.", file=sys.stderr)
    for source in manifest.lineage.traces:
        if source.sha256 == sha256:
            print(
                f"specmoe: {name} was made with these traces ({source.use}): its scores flatter it.",
                file=sys.stderr,
            )


def _fitted(train_traces: list[Path]) -> list[Baseline]:
    """Every baseline, fitted on these traces together; none without traces."""
    if not train_traces:
        return []
    trace = concatenate([load(path) for path in train_traces])
    return [baseline().fit(trace) for baseline in BASELINES.values()]


def _show(document: dict[str, Any]) -> None:
    print(f"{document['model']}, version {document['version']}\n\n{summary(document)}\n")
    print(distance_table(document, few_distances(document)))
    if document["baselines"]:
        print(f"\n{baseline_table(document)}")
    if document["cache"]:
        print(f"\n{cache_table(document)}")
    if document["adaptation"]:
        print(f"\n{adaptation_table(document)}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
