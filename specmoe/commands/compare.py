"""Train and score every approach on the same splits, into one report.

    specmoe compare --traces train.npz --validation validation.npz --test test.npz --folder comparison
    specmoe compare ... --predictors prefix interlayer popularity layer-markov oracle

Predictors, augmentations, plain baselines, the oracle, and a control that learns from shuffled routing. What
is trained has a folder of its own below --folder, is exported, and scored through its ONNX graphs. Those that
read hidden states take part where all traces have some (specmoe collect --hidden).
Interrupted, the same command goes on where it was. docs/evaluation.md tells what the report shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `specmoe compare`."""
    from training.precision import PRECISIONS

    parser.add_argument("--traces", type=Path, nargs="+", required=True, help="training traces")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="validation traces")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE|FOLDER", help="what to score on")
    parser.add_argument("--folder", type=Path, required=True, help="of this comparison: runs, scores, report")
    parser.add_argument(
        "--predictors", nargs="+", default=[], metavar="NAME", help="approaches by name; default: all of them"
    )
    parser.add_argument(
        "--top-seeds", type=_positive, default=1, metavar="N", help="seeds of the best three (1)"
    )
    parser.add_argument("--every", type=_positive, default=1, metavar="N", help="score one token in N (1)")
    parser.add_argument("--passes", type=_positive, help="over the training tokens; default: each preset's")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of products while training; default: each preset's"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny predictors on few tokens, in seconds: numbers mean nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Compare, write the report, show its table. Returns 0."""
    from specmoe.commands.train import told
    from training.approaches import check_names, chosen
    from training.compare import Comparison, Settings, compare
    from training.compare_report import REPORT, score_table, write_comparison
    from training.compare_traces import read_splits

    check_names(args.predictors)
    splits = read_splits(tuple(args.traces), tuple(args.validation), args.test)
    approaches = chosen(args.predictors, hidden=splits.hidden)
    comparison = Comparison(
        folder=args.folder,
        splits=splits,
        settings=Settings(every=args.every, passes=args.passes, precision=args.precision, quick=args.quick),
        command=told(sys.argv[1:]),
    )
    document = compare(comparison, approaches, args.top_seeds, _say)
    write_comparison(document, args.folder)
    print(score_table(document))
    print(f"\nWritten to {args.folder / REPORT}.")
    return 0


def _say(text: str) -> None:
    print(f"specmoe compare: {text}", file=sys.stderr)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
