"""The same predict.onnx behind other model servers, beside the service's REST and stream, in short turns.

All of them on one core, each for itself in its turn. The model call itself is measured in the same turns, so
that what a server adds to it can be told apart.

    specmoe bench --only servers
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from model_store.manifest import PREDICT
from model_store.store import StoredVersion
from service.routes import PREDICT_PATH
from specmoe.bench.aims import Aim
from specmoe.bench.contenders import CONNECTIONS, Contender, forecasts, requests
from specmoe.bench.cores import Cores
from specmoe.bench.flow import Flow
from specmoe.bench.latency import Latency, measure, warm_up
from specmoe.bench.load import Load, load
from specmoe.bench.other_servers import SERVERS, Endpoint, OtherServer, python_of, running, versions
from specmoe.bench.parts import Effort
from specmoe.bench.processes import Address, post, server
from specmoe.bench.routing import made_up, request_body
from specmoe.bench.step_time import StepTime
from specmoe.bench.stream_load import StreamLoad, stream_load
from specmoe.errors import BenchError
from speculation.runtime import Speculator

WARM_UP_SECONDS = 0.5
REST, STREAM = "specMoE, REST", "specMoE, stream"
# Of two machines' float32; a server that serves something else is much further off.
TOLERANCE = 1e-4
NOT_INSTALLED = "not installed: `make bench-servers` in a checkout of the repository"

ADDED = Aim("added to its call: the best other server / the stream, p50, 1 connection", 5, "×", True)
LATENCY = Aim("latency: the best other server / the stream, p50, 1 connection", 3, "×", True)
THROUGHPUT = Aim("REST / the best other server, answers a second, 16 connections", 2, "×", True)


class ServerComparison:
    """Times of everyone that serves the version, turn by turn, on the CPU.

    flags: of `specmoe serve`, for the store; installed: the folder of the other servers' environments.
    """

    def __init__(self, stored: StoredVersion, flags: list[str], cores: Cores, installed: Path) -> None:
        spec, version = stored.manifest.spec, stored.manifest.version
        self._graph = stored.graphs[PREDICT]
        self._flags = ["--models", f"{spec.model}@{version}", "--provider", "cpu", *flags]
        self._cores = cores
        self._installed = installed
        seen = spec.num_layers // 2
        self._routing = made_up(spec, batch=1, seen=seen, seed=0)
        self._body = orjson.dumps(request_body(spec.model, version, self._routing, seen=seen))
        self._flow = Flow.of(stored.manifest, sequences=1)
        speculator = Speculator(stored, provider="cpu", threads=1)
        self._predict = speculator.graphs[PREDICT]
        self._state = speculator.initial_state(1)
        self._step = StepTime(speculator, sequences=1)
        self._model, self._step_times = Latency(), Latency()
        self._others: list[Contender] = []
        self._rest: Contender | None = None
        self._stream: Contender | None = None

    def steps(self, effort: Effort) -> int:
        """The start, and the rounds."""
        return 1 + effort.rounds

    def run(self, effort: Effort) -> Generator[str]:
        """Every contender's turn, round after round; yields the name of what is measured next."""
        yield "starting model servers"
        with (
            tempfile.TemporaryDirectory(prefix="specmoe-bench-") as name,
            load(self._cores.client) as storm,
            stream_load(self._cores.client) as streams,
            self._started(Path(name), storm, streams) as contenders,
        ):
            warm_up(self._call)
            warm_up(self._step)
            for contender in contenders:
                contender.round(max(CONNECTIONS), WARM_UP_SECONDS)
            for number in range(effort.rounds):
                yield f"servers, round {number + 1} of {effort.rounds}"
                self._round(contenders, effort.round_seconds)

    def report(self) -> dict[str, Any]:
        """Fit for JSON: everyone's times, whom nobody installed, and the aims as far as they can be told."""
        if not self._rest or not self._stream or not len(self._rest.times[CONNECTIONS[-1]]):
            return {}
        rows = [self._rest, self._stream, *self._others]
        return {
            "model": self._model.report(),
            "step": self._step_times.report(),
            "rows": [row.report(self._step_times if row is self._stream else self._model) for row in rows],
            "skipped": [
                {"server": other.name, "note": NOT_INSTALLED}
                for other in SERVERS
                if not python_of(other, self._installed)
            ],
            "aims": self._aims(self._rest, self._stream),
        }

    def _aims(self, rest: Contender, stream: Contender) -> list[dict[str, Any]]:
        if not self._others:
            return []
        best, model = min(_p50_us(other) for other in self._others), self._model.percentile_us(50)
        most = max(other.times[16].per_second for other in self._others)
        ours, step = _p50_us(stream), self._step_times.percentile_us(50)
        return [
            ADDED.report((best - model) / (ours - step)),
            LATENCY.report(best / ours),
            THROUGHPUT.report(rest.times[16].per_second / most),
        ]

    def _round(self, contenders: list[Contender], seconds: float) -> None:
        turns = [
            (contender.times[connections], *contender.round(connections, seconds))
            for connections in CONNECTIONS
            for contender in contenders
        ]
        measure([(self._call, self._model), (self._step, self._step_times)], seconds)
        for latency, times_us, took in turns:  # whole rounds only: Ctrl-C must not favour anyone
            latency.add(times_us, took)

    def _call(self, number: int) -> np.ndarray[Any, Any]:
        """The model call of every request, by the session that the service's own is like."""
        routing = self._routing
        state = [self._state[place] for place in self._predict.reads]
        return self._predict(*state, routing.token_ids, routing.experts, routing.gates)[0]

    @contextlib.contextmanager
    def _started(self, folder: Path, storm: Load, streams: StreamLoad) -> Iterator[list[Contender]]:
        """Everyone, ready, and found to serve the same model."""
        graph = folder / PREDICT
        graph.write_bytes(self._graph)
        with contextlib.ExitStack() as started:
            arguments = ["serve", "--port", "0", *self._flags]
            ours = started.enter_context(
                server("specmoe.cli", arguments, ready="model ready", log=folder / "service.log")
            )
            self._rest = Contender(REST, requests(storm, ours, PREDICT_PATH, self._body))
            self._stream = Contender(STREAM, forecasts(streams, ours, self._flow))
            for other in SERVERS:
                if python := python_of(other, self._installed):
                    log = folder / f"{other.name}.log"
                    address = started.enter_context(running(other, python, graph, log))
                    self._others += self._endpoints(other, python, address, storm)
            yield [self._rest, self._stream, *self._others]

    def _endpoints(
        self, other: OtherServer, python: Path, address: Address, storm: Load
    ) -> Iterator[Contender]:
        version, runtime = versions(other, python)
        for endpoint in other.endpoints:
            body = orjson.dumps(endpoint.body(self._routing))
            self._check(endpoint, post(address, endpoint.path, body))
            yield Contender(endpoint.title, requests(storm, address, endpoint.path, body), version, runtime)

    def _check(self, endpoint: Endpoint, answer: bytes) -> None:
        """Everyone must answer what the model says. Raises BenchError."""
        came = np.ravel(endpoint.probabilities(orjson.loads(answer)))
        expected = np.ravel(self._call(0))
        if came.shape != expected.shape or np.abs(came - expected).max() > TOLERANCE:
            raise BenchError(
                f"{endpoint.title} answered other probabilities than the model called directly.",
                remedy="Install it again with `make bench-servers`: its ONNX Runtime must be ours.",
            )


def _p50_us(contender: Contender) -> float:
    return contender.times[1].percentile_us(50)
