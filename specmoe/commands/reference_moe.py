"""Train our own small mixture-of-experts language model, from scratch, on plain text.

    specmoe reference-moe texts --out runs/texts                  # from Debian packages; or --from FOLDER
    specmoe reference-moe train --texts runs/texts --run runs/reference
    specmoe reference-moe report runs/reference --texts runs/texts --out runs/reference-report

An hour on one core. RUN is then a folder that `specmoe collect` records. docs/reference-moe.md is the guide.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `specmoe reference-moe texts|train|report`."""
    from specmoe.commands.train import add_knobs
    from training.reference_moe.config import DEFAULTS

    actions = parser.add_subparsers(dest="action", required=True, metavar="texts|train|report")
    texts = actions.add_parser("texts", help="texts by domain, split into training, validation and test")
    texts.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where they go")
    texts.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FOLDER",
        help="own texts, a folder in it for each domain; default: Debian packages, kept in OUT/packages",
    )
    texts.add_argument(
        "--characters",
        type=int,
        default=4_000_000,
        metavar="N",
        help="of a domain at most, some; %(default)s",
    )
    train = actions.add_parser("train", help="train a model; --resume goes on")
    train.add_argument("--texts", type=Path, required=True, metavar="FOLDER", help="what `texts` wrote")
    train.add_argument(
        "--run", type=Path, required=True, metavar="FOLDER", help="of this run, and of the model"
    )
    train.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    train.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; --resume goes on")
    train.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one"
    )
    add_knobs(train.add_argument_group("model and training"), DEFAULTS)
    report = actions.add_parser("report", help="perplexity, use of the experts, curves")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="finished runs, the first one first"
    )
    report.add_argument(
        "--texts", type=Path, required=True, metavar="FOLDER", help="what they were trained on"
    )
    report.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="report.json, report.md, curve"
    )


def run(args: argparse.Namespace) -> int:
    """Do one of the three. Returns 0."""
    return {"texts": _texts, "train": _train, "report": _report}[args.action](args)


def _texts(args: argparse.Namespace) -> int:
    from training.reference_moe.packages import package_documents
    from training.reference_moe.texts import folder_documents, write_texts

    source = (
        package_documents(args.out / "packages") if args.source is None else folder_documents(args.source)
    )
    counts = write_texts(source, args.out, args.characters)
    for domain, by_split in counts.items():
        told = ", ".join(f"{split} {characters:,}" for split, characters in by_split.items())
        print(f"{domain}: {told} characters.")
    return 0


def _train(args: argparse.Namespace) -> int:
    from specmoe.commands.train import with_knobs
    from training.config import demand
    from training.reference_moe.config import DEFAULTS
    from training.reference_moe.pipeline import train

    shape = getattr(args, "shape", "decoder")
    demand(shape in DEFAULTS, "shape", shape, f"one of {', '.join(DEFAULTS)}")
    demand(args.minutes > 0, "minutes", args.minutes, "more than 0")
    config = with_knobs(DEFAULTS[shape], args)
    train(config, args.texts, args.run, device=args.device, minutes=args.minutes, resume=args.resume)
    return 0


def _report(args: argparse.Namespace) -> int:
    from training.reference_moe.report import report

    print(report(args.runs, args.texts, args.out))
    return 0
