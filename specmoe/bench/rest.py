"""The service beside a bare endpoint, over TCP and a Unix socket, in short turns.

One server core: what is measured in a turn has it for itself, the other servers wait. Whatever disturbs the
machine for longer than a turn disturbs all of them.

    specmoe bench --only rest
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from model_store.manifest import Manifest
from service.routes import PREDICT_PATH
from specmoe.bench.cores import Cores
from specmoe.bench.latency import Latency, measure, warm_up
from specmoe.bench.load import Load, load
from specmoe.bench.model_time import caller
from specmoe.bench.parts import Effort
from specmoe.bench.processes import Address, http_request, post, server
from specmoe.bench.routing import made_up, request_body
from specmoe.errors import BenchError
from speculation.runtime import Speculator

TRANSPORTS = ("tcp", "unix")
CONNECTIONS = (1, 16)
# Of the service's latency, in what a bare endpoint and the model take.
AIM = 1.6
WARM_UP_SECONDS = 0.2


@dataclass(frozen=True)
class Servers:
    """Addresses by transport."""

    service: dict[str, Address]
    bare: dict[str, Address]


class RestLatency:
    """Times of the service, of the bare endpoint and of the model alone, turn by turn.

    manifest: of the version that is served; flags: of `specmoe serve`, for the store and the provider.
    """

    def __init__(self, speculator: Speculator, manifest: Manifest, flags: list[str], cores: Cores) -> None:
        spec = speculator.spec
        self._flags = ["--models", f"{spec.model}@{manifest.version}", *flags]
        self._cores = cores
        self._seen = spec.num_layers // 2
        self._layers = spec.num_layers - self._seen
        routing = made_up(spec, batch=1, seen=self._seen, seed=0)
        self._body = orjson.dumps(request_body(spec.model, manifest.version, routing, seen=self._seen))
        self._request = http_request(PREDICT_PATH, self._body)
        self._answer_bytes = 0
        self._predict = caller(speculator.predict, speculator.initial_state(1), [routing])
        self._model = Latency()
        self._service = {key: Latency() for key in _keys()}
        self._bare = {key: Latency() for key in _keys()}

    def steps(self, effort: Effort) -> int:
        """The start, and the rounds."""
        return 1 + effort.rounds

    def run(self, effort: Effort) -> Generator[str]:
        """Every contender's turn, round after round; yields the name of what is measured next."""
        yield "starting servers"
        with (
            tempfile.TemporaryDirectory(prefix="specmoe-bench-") as name,
            self._servers(Path(name)) as servers,
            load(self._cores.client) as storm,
        ):
            warm_up(self._predict)
            for addresses in (servers.service, servers.bare):
                for address in addresses.values():
                    storm.round(address, self._request, max(CONNECTIONS), WARM_UP_SECONDS)
            for number in range(effort.rounds):
                yield f"round {number + 1} of {effort.rounds}"
                self._round(servers, storm, effort.round_seconds)

    def report(self) -> dict[str, Any]:
        """Fit for JSON. `ratio`: see `ratio`."""
        if not len(self._service[_keys()[-1]]):
            return {}
        return {
            "aim": AIM,
            "layers_seen": self._seen,
            "request_bytes": len(self._body),
            "answer_bytes": self._answer_bytes,
            "model": self._model.report(),
            "rows": [self._row(transport, connections) for transport, connections in _keys()],
        }

    def _row(self, transport: str, connections: int) -> dict[str, Any]:
        service, bare = self._service[transport, connections], self._bare[transport, connections]
        return {
            "transport": transport,
            "connections": connections,
            "service": service.report(),
            "bare": bare.report(),
            "ratio": round(ratio(service, bare, self._model, connections), 3),
        }

    def _round(self, servers: Servers, storm: Load, seconds: float) -> None:
        turns: list[tuple[Latency, list[float], float]] = []
        for connections in CONNECTIONS:
            for transport in TRANSPORTS:
                for addresses, times in ((servers.bare, self._bare), (servers.service, self._service)):
                    address = addresses[transport]
                    # A client of REST sleeps until its answer comes.
                    times_us, took = storm.round(address, self._request, connections, seconds, asleep=True)
                    turns.append((times[transport, connections], times_us, took))
        measure([(self._predict, self._model)], seconds)
        for latency, times_us, took in turns:  # whole rounds only: Ctrl-C must not favour anyone
            latency.add(times_us, took)

    @contextlib.contextmanager
    def _servers(self, folder: Path) -> Iterator[Servers]:
        """All four servers, ready; the bare ones give what the service answered."""
        answer = folder / "answer"
        service: dict[str, Address] = {}
        bare: dict[str, Address] = {}
        with contextlib.ExitStack() as running:

            def start(name: str, module: str, arguments: list[str], ready: str) -> Address:
                log = folder / f"{name}.log"
                return running.enter_context(server(module, arguments, ready=ready, log=log))

            for transport in TRANSPORTS:
                where = ["--port", "0"] if transport == "tcp" else ["--uds", str(folder / "service.sock")]
                arguments = ["serve", *where, *self._flags]
                service[transport] = start(f"service-{transport}", "specmoe.cli", arguments, "model ready")
            answer.write_bytes(self._checked(post(service["tcp"], PREDICT_PATH, self._body)))
            for transport in TRANSPORTS:
                arguments = [str(answer)] if transport == "tcp" else [str(answer), str(folder / "bare.sock")]
                bare[transport] = start(f"bare-{transport}", "specmoe.bench.bare", arguments, "listening")
            yield Servers(service, bare)

    def _checked(self, answer: bytes) -> bytes:
        """What is measured must be a prediction. Raises BenchError."""
        predictions = orjson.loads(answer)["predictions"]
        if [len(layers) for layers in predictions] != [self._layers]:
            raise BenchError(
                f"The service answered {[len(layers) for layers in predictions]} layers, "
                f"expected [{self._layers}].",
                remedy="Check that the service and this command are of the same release.",
            )
        self._answer_bytes = len(answer)
        return answer


def ratio(service: Latency, bare: Latency, model: Latency, connections: int) -> float:
    """How much longer the service takes than it would if it added nothing to a bare endpoint and the model.

    One process answers one request after the other, so with n connections a request waits for n model calls.
    """
    alone = bare.percentile_us(50) + connections * model.percentile_us(50)
    return service.percentile_us(50) / alone


def _keys() -> list[tuple[str, int]]:
    return [(transport, connections) for connections in CONNECTIONS for transport in TRANSPORTS]
