"""One step of a decode loop with the C client beside the Python client, in turns, over a Unix socket.

A step: tell a layer's routing with gates, and have the forecast that follows. A `specmoe serve` of its own.

.venv/bin/python benchmarks/c_client.py --rounds 10
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from specmoe_client import Stream

from specmoe.bench.processes import server

ROOT = Path(__file__).parents[1]
MODEL = "gpt-oss-20b"
WAIT_MS = 1000.0
Steps = list[tuple[float, float]]


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        socket = folder / "s"
        flags = ["serve", "--uds", str(socket), "--models", MODEL, "--provider", "cpu"]
        with (
            server("specmoe.cli", flags, ready="model ready", log=folder / "service.log"),
            subprocess.Popen(  # noqa: S603  # what was compiled here
                [compiled(folder), f"unix:{socket}", MODEL],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as c,
            Stream(uds=str(socket), model=MODEL) as python,
        ):
            if not python.ready():
                raise SystemExit(f"The service cannot be reached: {python.last_failure}")
            sequence = python.open()
            turns: dict[str, Steps] = {"C": [], "Python": []}
            for turn in range(args.rounds + 1):
                ours, theirs = told_by_c(c, args.tokens), told_by_python(python, sequence, args.tokens)
                if turn:  # the first is for warming up
                    turns["C"] += ours
                    turns["Python"] += theirs
            print(report(turns))
            c.stdin.close()


def compiled(folder: Path) -> Path:
    """The C client's side of it."""
    program = folder / "c_client"
    source = Path(__file__).with_suffix(".c")
    command = ["gcc", "-std=c11", "-O2", f"-I{ROOT / 'clients' / 'c'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)  # noqa: S603  # its own source
    return program


def told_by_c(process: subprocess.Popen[str], tokens: int) -> Steps:
    """(µs of telling, µs of the step) of every layer."""
    process.stdin.write(f"{tokens}\n")
    process.stdin.flush()
    steps: Steps = []
    for line in process.stdout:
        if line == "over\n":
            return steps
        told, whole = line.split()
        steps.append((float(told), float(whole)))
    raise SystemExit("The C client ended.")


def told_by_python(stream: Stream, sequence: int, tokens: int) -> Steps:
    """The same."""
    spec = stream.status.spec
    random, steps = np.random.default_rng(1), []
    gates = np.float32([[1 / (slot + 1) for slot in range(spec.top_k)]])
    for token in range(tokens):
        stream.start([sequence], [token % 1000])
        stream.wait(sequence, WAIT_MS, on_failure="raise")
        for layer in range(spec.num_layers):
            first = int(random.integers(spec.num_experts))
            experts = np.array([[(first + slot * 7) % spec.num_experts for slot in range(spec.top_k)]])
            began = time.perf_counter()
            stream.route([sequence], experts, gates)
            told = time.perf_counter()
            if layer < spec.num_layers - 1:
                stream.wait(sequence, WAIT_MS, on_failure="raise")
                steps.append(((told - began) * 1e6, (time.perf_counter() - began) * 1e6))
    return steps


def report(turns: dict[str, Steps]) -> str:
    """A table in Markdown."""
    lines = [
        f"{len(turns['C'])} steps each, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "",
        "| µs | step p50 | step p99 | telling p50 | telling p99 |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, steps in turns.items():
        told, whole = np.array(steps).T
        numbers = [*np.percentile(whole, [50, 99]), *np.percentile(told, [50, 99])]
        lines.append(f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="turns of each client")
    parser.add_argument("--tokens", type=int, default=50, help="tokens in a turn")
    return parser.parse_args()


if __name__ == "__main__":
    main()
