"""Turn a training run into calibrated ONNX graphs and a draft of their manifest, in RUN/export.

The validation traces are read again from where they lay when the run began.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `specmoe export`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")


def run(args: argparse.Namespace) -> int:
    """Export, with progress bars. Returns 0."""
    from training.export import export

    folder = export(args.run, progress=True)
    print(f"Exported to {folder}. Next: specmoe publish {folder} --store FOLDER --alias production")
    return 0
