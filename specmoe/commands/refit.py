"""Train a finished run's predictor once more, on its validation traces, too.

Recordings are costly, and a part of them is kept back to stop training by, to calibrate with and to score.
Once that is done, a predictor may learn from them as well: with the same knobs, for as many passes as were
best. Probabilities and sets stay calibrated as RUN's are, which had not seen those traces, and the scores in
the manifest are RUN's.

    specmoe refit runs/mine --traces train.npz --run runs/final --publish --store ./store --alias production
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `specmoe refit`."""
    from specmoe.commands.train import add_ending

    parser.add_argument("base", type=Path, metavar="RUN", help="folder of a finished training run")
    parser.add_argument(
        "--traces",
        type=Path,
        nargs="+",
        required=True,
        help="the training traces that RUN had, in their order",
    )
    add_ending(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and export and publish where asked to. Returns 0."""
    from specmoe.commands.train import check_ending, told
    from training.pipeline import refit

    check_ending(args)
    refit(
        args.base,
        traces=tuple(args.traces),
        folder=args.run,
        command=told(sys.argv[1:]),
        resume=args.resume,
        store=args.store if args.publish else None,
        aliases=tuple(args.alias),
    )
    return 0
