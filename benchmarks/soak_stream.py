"""Streams under random traffic for minutes: each forecast checked, all accounted for, nothing left over.

A `specmoe serve` of its own; clients in other processes that open, close, burst, do not read, cut their
connection and talk nonsense. Exits with 1 on any violation.

.venv/bin/python benchmarks/soak_stream.py --minutes 10
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from soaking import Gone, Life, Tally, Violation
from tqdm import tqdm

from model_store.store import open_store
from speculation.runtime import load_speculator

SAMPLE_SECONDS = 5.0
# Of its last third against its second third. Within the first minutes rows are still used for the first time.
MEMORY_GROWTH, JUDGED_FROM_SECONDS = 0.02, 300.0
LIFE_SECONDS = (0.2, 6.0)
SETTLE_SECONDS = 10.0


def main() -> int:
    args = arguments()
    seconds = args.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "service.log"
        process, address = started(args, log)
        try:
            tally, memory = soaked(args, process, address, seconds)
            tally.violations += left_over(address)
        finally:
            process.terminate()
            code = process.wait(60)
        tally.violations += in_log(log, code)
    tally.violations += growth(memory, seconds)
    result = {
        "minutes": args.minutes,
        "model": args.model,
        "seed": args.seed,
        "workers": args.workers,
        "streams_at_once": args.workers * args.streams,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **vars(tally),
        "memory_bytes": memory,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(page(tally, memory, seconds))
    return 1 if tally.violations else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--store", help="folder of the store; without it: the bundled versions")
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--streams", type=int, default=4, help="streams of a process at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    return parser.parse_args()


def started(args: argparse.Namespace, log: Path) -> tuple[subprocess.Popen[bytes], tuple[str, int]]:
    """A service that is ready, and where it listens."""
    store = ["--store", args.store] if args.store else []
    flags = ["--port", "0", "--provider", "cpu", "--models", args.model, *store]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECMOE_")}
    with log.open("wb") as written:
        process = subprocess.Popen(  # noqa: S603  # our own program
            [sys.executable, "-m", "specmoe.cli", "serve", *flags], stderr=written, env=environment
        )
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        events = logged(log)
        if any(event["message"] == "model ready" for event in events):
            url = next(event["address"] for event in events if "address" in event)
            return process, ("127.0.0.1", int(url.rpartition(":")[2]))
        time.sleep(0.05)
    process.kill()
    raise SystemExit("the service did not start:\n" + log.read_text(encoding="utf-8"))


def soaked(
    args: argparse.Namespace, process: subprocess.Popen[bytes], address: tuple[str, int], seconds: float
) -> tuple[Tally, list[int]]:
    """All that happened, and the service's memory from time to time."""
    spawn = multiprocessing.get_context("spawn")
    reports: Any = spawn.Queue()
    version = open_store(args.store).resolve(args.model, None)
    workers = [
        spawn.Process(
            target=work,
            args=(address, args.store, args.model, version, seconds, args.streams, args.seed + n, reports),
        )
        for n in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    tally, memory = Tally(), []
    service = psutil.Process(process.pid)
    began = time.monotonic()
    pause = min(SAMPLE_SECONDS, seconds / 20)
    with tqdm(total=round(seconds), unit="s") as bar:
        while any(worker.is_alive() for worker in workers) or not reports.empty():
            until = time.monotonic() + pause
            while (left := until - time.monotonic()) > 0:
                try:
                    tally.add(reports.get(timeout=left))
                except queue.Empty:
                    break
            if process.poll() is not None:
                raise SystemExit(f"the service ended with {process.returncode}")
            if time.monotonic() - began < seconds:
                memory.append(service.memory_info().rss)
            bar.update(min(round(time.monotonic() - began), bar.total) - bar.n)
            bar.set_postfix(forecasts=tally.forecasts, violations=len(tally.violations))
    for number, worker in enumerate(workers):
        worker.join()
        if worker.exitcode:
            tally.violations.append(f"worker {number} ended with {worker.exitcode}")
    return tally, memory


def work(
    address: tuple[str, int],
    store: str | None,
    model: str,
    version: int,
    seconds: float,
    streams: int,
    seed: int,
    reports: Any,
) -> None:
    """A client process: so many streams at once, one after another."""
    speculator = load_speculator(model, version=version, store=open_store(store), provider="cpu")
    end = time.monotonic() + seconds

    def lives(chance: random.Random) -> None:
        while time.monotonic() < end:
            reports.put(lived(address, speculator, chance, end))

    threads = [threading.Thread(target=lives, args=(random.Random(f"{seed}.{n}"),)) for n in range(streams)]  # noqa: S311
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def lived(address: tuple[str, int], speculator: Any, chance: random.Random, end: float) -> Tally:
    """One stream."""
    life = None
    try:
        life = Life(address, speculator, chance)
        life.live(min(time.monotonic() + chance.uniform(*LIFE_SECONDS), end))
    except (Violation, Gone, OSError) as error:
        tally = life.end() if life else Tally(streams=1)
        tally.violations.append(f"{type(error).__name__}: {error}")
        return tally
    return life.end()


def left_over(address: tuple[str, int]) -> list[str]:
    """What the service still holds, though everybody has gone."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        with urllib.request.urlopen(  # noqa: S310  # our own service
            "http://{}:{}/metrics".format(*address), timeout=10
        ) as answer:
            lines = answer.read().decode().splitlines()
        held = [line for line in lines if line.startswith(("specmoe_streams ", "specmoe_stream_sequences "))]
        if len(held) == 2 and all(line.endswith(" 0.0") for line in held):
            return []
        if time.monotonic() > end:
            return [f"left over: {', '.join(held)}"]
        time.sleep(0.1)


def logged(log: Path) -> list[dict[str, Any]]:
    """What the service has said."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def in_log(log: Path, code: int) -> list[str]:
    """Faults that the service told of itself."""
    faults = [event for event in logged(log) if str(event.get("level", "")).lower() in ("error", "critical")]
    told = [f"the service logged: {json.dumps(fault)[:2000]}" for fault in faults[:5]]
    return told + ([f"the service ended with {code}"] if code else [])


def growth(memory: list[int], seconds: float) -> list[str]:
    """Whether memory grew."""
    ratio = growth_ratio(memory)
    if seconds >= JUDGED_FROM_SECONDS and ratio > 1 + MEMORY_GROWTH:
        return [f"memory grew by {ratio - 1:.1%} from the second third of the time to the last"]
    return []


def growth_ratio(memory: list[int]) -> float:
    third = len(memory) // 3
    return statistics.median(memory[-third:]) / statistics.median(memory[third:-third]) if third else 1.0


def page(tally: Tally, memory: list[int], seconds: float) -> str:
    megabytes = [round(size / 1e6) for size in memory] or [0]
    lines = [
        f"{seconds / 60:g} minutes, {tally.streams} streams, {tally.cut} of them cut",
        f"{tally.messages} messages, {tally.routing} of routing; {tally.wrong} wrong ones, each refused",
        f"{tally.forecasts} forecasts checked, the largest difference {tally.largest_difference:.1g}; "
        f"{tally.unions} unions came",
        f"{tally.due} forecasts were due, {tally.dropped} of them dropped; none was missing "
        f"whenever it was counted, {tally.accounts} times",
        f"{tally.too_late} counts given up: a client with a deadline got no forecast within 5 s, which is "
        "no violation here, since what it never got tells how many were dropped",
        f"memory {megabytes[0]} MB at first, {max(megabytes)} MB at most, {megabytes[-1]} MB at last; "
        f"last third to second third {growth_ratio(memory):.3f}",
        f"{len(tally.violations)} violations",
        *(f"  {violation}" for violation in tally.violations[:20]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
