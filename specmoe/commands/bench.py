"""Measure model time and the service's latency on this machine, beside references in the same run.

    specmoe bench
    specmoe bench --quick --only rest stream
    specmoe bench --model deepseek-v2-lite@2 --store runs/store --json bench.json --markdown bench.md

First the model alone, beside bare ONNX Runtime; then a real `specmoe serve`: REST beside a bare FastAPI
endpoint, streams beside the model call, both beside other model servers where they are installed, and the
memory that many sequences take. docs/benchmarks.md tells how to read it. Ctrl-C ends it and prints what there
is.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_store.store import StoredVersion, open_store
from service.settings import ModelChoice

if TYPE_CHECKING:
    from specmoe.bench.cores import Cores
    from specmoe.bench.parts import Effort, Part
    from speculation.runtime import Speculator

MODEL = "gpt-oss-20b"


# What can be chosen, and its place in the report.
PARTS = {
    "model": "model_time",
    "rest": "rest",
    "stream": "stream",
    "servers": "servers",
    "memory": "memory",
}


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
    add("--only", choices=PARTS, nargs="+", default=PARTS, metavar="PART", help=f"{', '.join(PARTS)} (all)")
    add("--quick", action="store_true", help="too short to compare with anything: shows that it runs")
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
    from specmoe.bench.parts import FULL, QUICK
    from speculation.runtime import Speculator

    model = args.model.model
    store = open_store(args.store)
    stored = store.load(model, store.resolve(model, args.model.selector))
    cores = choose_cores()
    machine = describe(cores)
    with pinned(cores.server):
        speculator = Speculator(stored, provider=args.provider, threads=1)
        parts = _parts(stored, speculator, args.store, cores, args.only)
        complete = _carry_out(list(parts.values()), QUICK if args.quick else FULL)
    return {
        "model": model,
        "version": stored.manifest.version,
        "provider": speculator.provider,
        "quick": args.quick,
        "complete": complete,
        "machine": machine,
        **{PARTS[name]: part.report() for name, part in parts.items()},
    }


def _parts(
    stored: StoredVersion,
    speculator: Speculator,
    store: str | None,
    cores: Cores,
    chosen: Collection[str],
) -> dict[str, Part]:
    """Those that were chosen, in the order in which they are measured."""
    from specmoe.bench.memory import StreamMemory
    from specmoe.bench.model_time import ModelTime
    from specmoe.bench.other_servers import INSTALLED
    from specmoe.bench.rest import RestLatency
    from specmoe.bench.servers import ServerComparison
    from specmoe.bench.stream import StreamLatency

    stores = ["--store", store] if store else []
    flags = ["--provider", speculator.provider, *stores]
    made: dict[str, Callable[[], Part]] = {
        "model": lambda: ModelTime(stored, speculator),
        "rest": lambda: RestLatency(speculator, stored.manifest, flags, cores),
        "stream": lambda: StreamLatency(speculator, stored.manifest, flags, cores),
        "servers": lambda: ServerComparison(stored, stores, cores, INSTALLED),
        "memory": lambda: StreamMemory(stored.manifest, flags),
    }
    return {name: make() for name, make in made.items() if name in chosen}


def _carry_out(parts: list[Part], effort: Effort) -> bool:
    """Every step of them, named by a progress bar; False where Ctrl-C ended it."""
    from tqdm import tqdm

    # Given up, a part must still stop its servers: closing does that, wherever Ctrl-C came.
    runs = [part.run(effort) for part in parts]
    steps = sum(part.steps(effort) for part in parts)
    with contextlib.ExitStack() as begun, tqdm(total=steps, unit="step") as bar:
        for run in runs:
            begun.callback(run.close)
        try:
            for name in itertools.chain(*runs):
                bar.set_description(name)
                bar.update()
        except KeyboardInterrupt:
            return False
    return True
