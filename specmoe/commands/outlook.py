"""Train the outlook of a version: which experts later tokens will use, so that a cache knows what to keep.

    specmoe outlook gpt-oss-20b --traces train.npz --validation validation.npz --folder runs/outlook
    specmoe publish runs/outlook --store ./store --alias production

The version itself stays as it is; FOLDER holds its graphs with outlook.onnx beside them, to be published as
a version of its own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from specmoe.commands.evaluate import model_and_version
from specmoe.commands.train import add_knobs, told, with_knobs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `specmoe outlook`: version, files, and every knob."""
    from training.outlook import OutlookConfig

    parser.add_argument("model", metavar="MODEL[@VERSION]", help="VERSION: a number or an alias (production)")
    parser.add_argument("--store", metavar="LOCATION", help="folder or s3://bucket/prefix (the bundled one)")
    parser.add_argument("--traces", type=Path, nargs="+", required=True, help="training traces")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="to calibrate and score on")
    parser.add_argument("--folder", type=Path, required=True, help="where to write the version with it")
    add_knobs(parser.add_argument_group("outlook"), {"outlook": OutlookConfig()})


def run(args: argparse.Namespace) -> int:
    """Train and export. Returns 0."""
    import sys

    from model_store.manifest import Lineage
    from model_store.store import open_store
    from training.outlook import OutlookConfig, train_outlook
    from training.run import environment, load_traces

    began = time.perf_counter()
    model, version = model_and_version(args.model)
    store = open_store(args.store)
    stored = store.load(model, store.resolve(model, version))
    train, learned = load_traces(tuple(args.traces), "train")
    validation, held_out = load_traces(tuple(args.validation), "validation")
    config: OutlookConfig = with_knobs(OutlookConfig(), args)
    lineage = Lineage(
        traces=learned + held_out,
        command=told(sys.argv[1:]),
        seed=config.seed,
        trained_seconds=0.0,
        **environment(),
    )
    description = train_outlook(stored, train, validation, config, lineage, args.folder)
    print(_summary(description.metrics["validation"], config.tokens, time.perf_counter() - began))
    print(f"Exported to {args.folder}. Next: specmoe publish {args.folder} --store FOLDER --alias production")
    return 0


def _summary(scores: dict[str, Any], tokens: int, seconds: float) -> str:
    found = " ".join(f"{name} {value:.4f}" for name, value in scores.items())
    return f"Uses within {tokens} tokens, validation: {found} ({seconds:.0f} s)."
