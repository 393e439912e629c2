"""Measure model time and the service's latency on this machine, beside references in the same run.

    specmoe bench
    specmoe bench --quick --only rest
    specmoe bench --model deepseek-v2-lite@2 --store runs/store --json bench.json --markdown bench.md

First the model alone, beside bare ONNX Runtime; then a real `specmoe serve` over TCP and a Unix socket,
beside a bare FastAPI endpoint, in short turns. docs/benchmarks.md tells how to read it. Ctrl-C ends it and
prints what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_store.store import open_store
from service.settings import ModelChoice

MODEL = "gpt-oss-20b"


@dataclass(frozen=True)
class Effort:
    """model_seconds: for each case and batch size. round_seconds: of every contender's turn in a round."""

    model_seconds: float
    rounds: int
    round_seconds: float


# Some 80 seconds, enough for thousands of calls each; and a few, which only tell that everything runs.
FULL = Effort(model_seconds=2.0, rounds=14, round_seconds=0.4)
QUICK = Effort(model_seconds=0.05, rounds=2, round_seconds=0.05)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, for how long, and where the numbers go."""
    add = parser.add_argument
    add(
        "--model",
        type=ModelChoice.parse,
        default=ModelChoice(MODEL),
        metavar="NAME[@VERSION]",
        help=f"({MODEL})",
    )
    add("--store", metavar="STORE", help="folder or s3://bucket/prefix (the bundled versions)")
    add(
        "--provider",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the model runs (%(default)s)",
    )
    add("--only", choices=("model", "rest"), help="one half of it")
    add("--quick", action="store_true", help="a few seconds: too short to compare with anything")
    add("--json", type=Path, metavar="OUT", help="write the numbers there")
    add("--markdown", type=Path, metavar="OUT", help="write the tables there")


def run(args: argparse.Namespace) -> int:
    """Measure, then print tables and write what was asked for."""
    from specmoe.bench.report import markdown

    report = _measured(args)
    text = markdown(report)
    print(text, end="")
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["complete"] else 130


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    from specmoe.bench.cores import choose_cores, pinned
    from specmoe.bench.machine import describe
    from specmoe.bench.model_time import ModelTime
    from specmoe.bench.rest import RestLatency
    from speculation.runtime import Speculator

    model = args.model.model
    store = open_store(args.store)
    stored = store.load(model, store.resolve(model, args.model.selector))
    effort = QUICK if args.quick else FULL
    cores = choose_cores()
    machine = describe(cores)
    with pinned(cores.server):
        speculator = Speculator(stored, provider=args.provider, threads=1)
        flags = ["--provider", speculator.provider, *(["--store", args.store] if args.store else [])]
        model_time = ModelTime(stored, speculator)
        rest = RestLatency(speculator, stored.manifest, flags, cores)
        halves = {
            "model": model_time.run(effort.model_seconds),
            "rest": rest.run(effort.rounds, effort.round_seconds),
        }
        chosen = [name for name in halves if args.only in (None, name)]
        steps = {"model": model_time.steps, "rest": effort.rounds + 1}
        complete = _carry_out([halves[name] for name in chosen], sum(steps[name] for name in chosen))
    return {
        "model": model,
        "version": stored.manifest.version,
        "provider": speculator.provider,
        "quick": args.quick,
        "complete": complete,
        "machine": machine,
        "model_time": model_time.report(),
        "rest": rest.report(),
    }


def _carry_out(halves: list[Generator[str]], steps: int) -> bool:
    """Every step of them, named by a progress bar; False where Ctrl-C ended it."""
    from tqdm import tqdm

    # Given up, a half must still stop its servers: closing does that, wherever Ctrl-C came.
    with contextlib.ExitStack() as begun, tqdm(total=steps, unit="step") as bar:
        for half in halves:
            begun.callback(half.close)
        try:
            for name in itertools.chain(*halves):
                bar.set_description(name)
                bar.update()
        except KeyboardInterrupt:
            return False
    return True
