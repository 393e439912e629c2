"""Other model servers, each in a virtual environment of its own: which there are, and one of them running.

What they run lies in `benchmarks/servers/`, a folder each; `make bench-servers` installs them.

    specmoe bench --only servers
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from specmoe.bench.processes import POLL_SECONDS, READY_SECONDS, STOP_SECONDS, Address, connect
from specmoe.bench.routing import Routing
from specmoe.errors import BenchError

ROOT = Path(__file__).parents[2]
WRAPPERS = ROOT / "benchmarks" / "servers"
INSTALLED = ROOT / ".venv-servers"
VERSIONS = "import importlib.metadata as m, sys; print(*(m.version(name) for name in sys.argv[1:]))"

Body: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers. body: of a request; probabilities: of a parsed answer, in any nesting."""

    title: str
    path: str
    body: Callable[[Routing], Body]
    probabilities: Callable[[Any], Any]


@dataclass(frozen=True)
class OtherServer:
    """name: of its package on PyPI, its wrapper's folder and its virtual environment."""

    name: str
    endpoints: tuple[Endpoint, ...]


def lists(routing: Routing) -> Body:
    """The arrays as nested lists, by name."""
    return {name: array.tolist() for name, array in _tensors(routing).items()}


def rows(routing: Routing) -> Body:
    """The sequences one by one, for a server that puts them together itself."""
    columns = lists(routing)
    return {"rows": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}


def open_inference(routing: Routing) -> Body:
    """The request of the Open Inference Protocol."""
    datatypes = {"token_id": "INT64", "experts": "INT32", "gates": "FP32"}
    return {
        "inputs": [
            {
                "name": name,
                "shape": array.shape,
                "datatype": datatypes[name],
                "data": array.ravel().tolist(),
            }
            for name, array in _tensors(routing).items()
        ]
    }


def _open_inference_data(answer: Any) -> Any:
    return answer["outputs"][0]["data"]


def _open_inference_at(title: str) -> Endpoint:
    return Endpoint(title, "/v2/models/model/infer", open_inference, _open_inference_data)


SERVERS = (
    OtherServer("mlserver", (_open_inference_at("MLServer"),)),
    OtherServer(
        "litserve", (Endpoint("LitServe", "/predict", lists, lambda answer: answer["probabilities"]),)
    ),
    OtherServer(
        "bentoml",
        (
            Endpoint("BentoML", "/predict", lists, lambda answer: answer),
            Endpoint("BentoML, adaptive batching", "/predict_batched", rows, lambda answer: answer),
        ),
    ),
    OtherServer("kserve", (_open_inference_at("KServe SDK"),)),
)


def python_of(server: OtherServer, installed: Path) -> Path | None:
    """Its interpreter; None where it is not installed."""
    python = installed / server.name / "bin" / "python"
    return python if python.exists() and (WRAPPERS / server.name).exists() else None


def versions(server: OtherServer, python: Path) -> tuple[str, str]:
    """Of the server and of ONNX Runtime, as they are installed there."""
    found = subprocess.run(  # noqa: S603  # an interpreter that make installed
        [python, "-c", VERSIONS, server.name, "onnxruntime"], capture_output=True, check=True, text=True
    )
    version, runtime = found.stdout.split()
    return version, runtime


@contextlib.contextmanager
def running(server: OtherServer, python: Path, graph: Path, log: Path) -> Iterator[Address]:
    """The server until the block ends: its address, once it listens. Raises BenchError where it does not."""
    port = _free_port()
    command = [str(part) for part in (python, WRAPPERS / server.name / "model.py", graph, port)]
    with log.open("wb") as written:
        process = subprocess.Popen(  # noqa: S603  # an interpreter that make installed
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=written,
            stderr=written,
            start_new_session=True,
        )
        try:
            yield _listening(server, ["127.0.0.1", port], process, log)
        finally:
            _stop_all(process)


def _tensors(routing: Routing) -> dict[str, np.ndarray[Any, Any]]:
    # As double precision they keep the four decimals they were made with.
    gates = np.round(routing.gates.astype(np.float64), 4)
    return {"token_id": routing.token_ids, "experts": routing.experts, "gates": gates}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listening(server: OtherServer, address: Address, process: subprocess.Popen[bytes], log: Path) -> Address:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connect(address).close()
            return address
        time.sleep(POLL_SECONDS)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise BenchError(
        f"{server.name} did not become ready; it said: {said[-1] if said else 'nothing'}",
        remedy=f"Remove .venv-servers/{server.name} and `make bench-servers`, or go without it.",
    )


def _stop_all(process: subprocess.Popen[bytes]) -> None:
    """It and the processes it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
