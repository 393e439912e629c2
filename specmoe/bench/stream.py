"""The stream: from routing to forecast, over TCP and a Unix socket, beside the model call, in short turns.

A decode loop in which each layer waits for its forecast: one sequence, a batch of 32 in one frame, and 16
connections at once, with and without batches of their sequences.

    specmoe bench --only stream
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_store.manifest import Manifest
from specmoe.bench.aims import Aim
from specmoe.bench.cores import Cores
from specmoe.bench.flow import Flow
from specmoe.bench.latency import Latency, measure, warm_up
from specmoe.bench.model_time import caller
from specmoe.bench.parts import Effort
from specmoe.bench.processes import Address, server
from specmoe.bench.routing import made_up
from specmoe.bench.step_time import StepTime
from specmoe.bench.stream_load import StreamLoad, Times, stream_load
from speculation.runtime import Speculator

WARM_UP_SECONDS = 0.2


@dataclass(frozen=True)
class Case:
    """sequences: in each frame; server: which of `SERVERS` answers; asleep: the client, as it waits."""

    title: str
    server: str
    sequences: int = 1
    connections: int = 1
    asleep: bool = False


# Flags of `specmoe serve`, beside where it listens.
ASLEEP = ["--stream-spin-us", "0"]
SERVERS: dict[str, list[str]] = {
    "tcp": [],
    "unix": [],
    "tcp asleep": ASLEEP,
    "unbatched": ["--stream-batch-rows", "1"],
}
ONE_TCP = Case("1 sequence, TCP loopback", "tcp")
ONE_UNIX = Case("1 sequence, Unix socket", "unix")
ONE_CLIENT_ASLEEP = Case("1 sequence, TCP loopback, client asleep", "tcp", asleep=True)
ONE_BOTH_ASLEEP = Case("1 sequence, TCP loopback, both asleep", "tcp asleep", asleep=True)
BATCH = Case("32 sequences in a frame, TCP loopback", "tcp", sequences=32)
MANY = Case("16 connections, TCP loopback", "tcp", connections=16)
MANY_UNBATCHED = Case("16 connections, TCP loopback, no batches", "unbatched", connections=16)
CASES = (ONE_TCP, ONE_UNIX, ONE_CLIENT_ASLEEP, ONE_BOTH_ASLEEP, BATCH, MANY, MANY_UNBATCHED)


class Forecasts:
    """Times of one case: at token start, after a layer, and all of them."""

    def __init__(self) -> None:
        self.start, self.layer, self.all = Latency(), Latency(), Latency()

    def add(self, times: Times) -> None:
        """What one round brought."""
        self.start.add(times.start_us, times.seconds)
        self.layer.add(times.layer_us, times.seconds)
        self.all.add(times.start_us + times.layer_us, times.seconds)


class StreamLatency:
    """Times of every case, and of the model call of as many sequences, turn by turn.

    manifest: of the version that is served; flags: of `specmoe serve`, for the store and the provider.
    """

    def __init__(self, speculator: Speculator, manifest: Manifest, flags: list[str], cores: Cores) -> None:
        spec = speculator.spec
        self._manifest = manifest
        self._flags = ["--models", f"{spec.model}@{manifest.version}", *flags]
        self._cores = cores
        self._times = {case: Forecasts() for case in CASES}
        sizes = sorted({case.sequences for case in CASES})
        self._steps = {size: StepTime(speculator, size) for size in sizes}
        self._step_times = {size: Latency() for size in sizes}
        routing = made_up(spec, batch=1, seen=spec.num_layers // 2, seed=0)
        self._predict = caller(speculator.predict, speculator.initial_state(1), [routing])
        self._predict_times = Latency()

    def steps(self, effort: Effort) -> int:
        """The start, and the rounds."""
        return 1 + effort.rounds

    def run(self, effort: Effort) -> Generator[str]:
        """Every contender's turn, round after round; yields the name of what is measured next."""
        yield "starting streams"
        with (
            tempfile.TemporaryDirectory(prefix="specmoe-bench-") as name,
            self._servers(Path(name)) as addresses,
            stream_load(self._cores.client) as load,
        ):
            warm_up(self._predict)
            for step in self._steps.values():
                warm_up(step)
            for case in CASES:
                self._decode(load, addresses, case, WARM_UP_SECONDS)
            for number in range(effort.rounds):
                yield f"stream, round {number + 1} of {effort.rounds}"
                self._round(load, addresses, effort.round_seconds)

    def report(self) -> dict[str, Any]:
        """Fit for JSON: a row a case, and the aims."""
        if not len(self._times[CASES[-1]].all):
            return {}
        return {
            "predict": self._predict_times.report(),
            "steps": {str(size): times.report() for size, times in self._step_times.items()},
            "rows": [self._row(case) for case in CASES],
            "aims": self._aims(),
        }

    def _row(self, case: Case) -> dict[str, Any]:
        times = self._times[case]
        return {
            "case": case.title,
            "sequences": case.sequences,
            "connections": case.connections,
            "all": times.all.report(),
            "start": times.start.report(),
            "layer": times.layer.report(),
            "forecasts_per_second": round(times.all.per_second * case.sequences, 1),
            "added_us": round(self._added_us(case), 2),
        }

    def _added_us(self, case: Case) -> float:
        """At p50, to one model call of as many sequences as a frame has."""
        return self._times[case].all.percentile_us(50) - self._step_times[case.sequences].percentile_us(50)

    def _aims(self) -> list[dict[str, Any]]:
        def percentile(case: Case, share: float) -> float:
            return self._times[case].all.percentile_us(share)

        return [
            Aim(f"{ONE_TCP.title}, p50", 200, "µs").report(percentile(ONE_TCP, 50)),
            Aim(f"{ONE_TCP.title}, p99", 500, "µs").report(percentile(ONE_TCP, 99)),
            Aim(f"{ONE_TCP.title}, added to the model call", 120, "µs").report(self._added_us(ONE_TCP)),
            Aim(f"{ONE_UNIX.title}, p50", 150, "µs").report(percentile(ONE_UNIX, 50)),
            Aim(f"{BATCH.title}, p50", 1500, "µs").report(percentile(BATCH, 50)),
            Aim(f"{MANY.title}, forecasts a second", 6000, "", True).report(self._times[MANY].all.per_second),
            Aim(f"{MANY.title}, p99", 10_000, "µs").report(percentile(MANY, 99)),
        ]

    def _round(self, load: StreamLoad, addresses: dict[str, Address], seconds: float) -> None:
        turns = [(case, self._decode(load, addresses, case, seconds)) for case in CASES]
        for size, step in self._steps.items():
            measure([(step, self._step_times[size])], seconds / 2)
        measure([(self._predict, self._predict_times)], seconds / 2)
        for case, times in turns:  # whole rounds only: Ctrl-C must not favour anyone
            self._times[case].add(times)

    def _decode(self, load: StreamLoad, addresses: dict[str, Address], case: Case, seconds: float) -> Times:
        flow = Flow.of(self._manifest, case.sequences)
        address = addresses[case.server]
        return load.round(address, flow, case.connections, seconds, asleep=case.asleep)

    @contextlib.contextmanager
    def _servers(self, folder: Path) -> Iterator[dict[str, Address]]:
        """All of them, ready."""
        addresses: dict[str, Address] = {}
        with contextlib.ExitStack() as running:
            for name, more in SERVERS.items():
                socket = folder / f"{name.replace(' ', '-')}.sock"
                where = ["--uds", str(socket)] if name.startswith("unix") else ["--port", "0"]
                started = server(
                    "specmoe.cli",
                    ["serve", *where, *self._flags, *more],
                    ready="model ready",
                    log=folder / f"{name}.log",
                )
                addresses[name] = running.enter_context(started)
            yield addresses
