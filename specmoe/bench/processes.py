"""The processes of a measurement: servers that are ready, and the load that is put on them.

specmoe bench --only rest
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from specmoe.errors import BenchError

# [host, port], or the path of a Unix socket.
Address: TypeAlias = list[Any] | str

READY_SECONDS = 60.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02


@contextlib.contextmanager
def server(module: str, arguments: Sequence[str], *, ready: str, log: Path) -> Iterator[Address]:
    """A server until the block ends. Gives its address, once `ready` is a message of its log.

    Raises BenchError where it ends, or refuses what it shall serve.
    """
    with log.open("wb") as written, _started(module, arguments, stderr=written) as process:
        try:
            yield _address_when_ready(process, ready, log)
        finally:
            _stop(process)


class Load:
    """The process that sends requests; see `specmoe.bench.load`."""

    def __init__(self, orders: IO[bytes], results: IO[bytes]) -> None:
        self._orders, self._results = orders, results

    def round(self, address: Address, connections: int, seconds: float) -> tuple[list[float], float]:
        """(microseconds of every request, seconds in all). Raises BenchError where an answer was wrong."""
        order = {"address": address, "connections": connections, "seconds": seconds}
        try:
            self._orders.write(json.dumps(order).encode() + b"\n")
            self._orders.flush()
            line = self._results.readline()
        except BrokenPipeError:
            line = b""
        result = json.loads(line or b'{"error": "the process that sends requests ended"}')
        if "error" in result:
            raise BenchError(f"The load failed: {result['error']}.", remedy="See what the message says.")
        return result["times_us"], result["seconds"]


@contextlib.contextmanager
def load(request: bytes, folder: Path, core: int | None) -> Iterator[Load]:
    """A process that sends this request on orders, until the block ends."""
    path = folder / "request"
    path.write_bytes(request)
    arguments = [str(path)] if core is None else [str(path), str(core)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with _started("specmoe.bench.load", arguments, **pipes) as process:
        try:
            if process.stdin and process.stdout:
                yield Load(process.stdin, process.stdout)
        finally:
            _stop(process)


def post(address: Address, path: str, body: bytes) -> bytes:
    """One answer, on a connection of its own. Raises BenchError where it is not 200."""
    connection = http.client.HTTPConnection("service", timeout=READY_SECONDS)
    connection.sock = _connected(address)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    if response.status != 200:
        raise BenchError(
            f"The service answered {response.status}: {answer[:300].decode(errors='replace')}",
            remedy="See what the message says.",
        )
    return answer


def http_request(path: str, body: bytes) -> bytes:
    """The bytes of a POST as a lean client sends it."""
    head = f"POST {path} HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _started(module: str, arguments: Sequence[str], **pipes: Any) -> subprocess.Popen[bytes]:
    """A module as a process: with the default settings, and deaf to Ctrl-C, which is for us to act on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECMOE_")}
    return subprocess.Popen(  # noqa: S603  # our own modules
        [sys.executable, "-m", module, *arguments], env=environment, start_new_session=True, **pipes
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _address_when_ready(process: subprocess.Popen[bytes], ready: str, log: Path) -> Address:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        lines = log.read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        if any(event["message"] == ready for event in events):
            return _address(next(event["address"] for event in events if "address" in event))
        if any(event["message"] == "model refused" for event in events):
            break
        time.sleep(POLL_SECONDS)
    said = log.read_text(encoding="utf-8").strip().splitlines()
    raise BenchError(
        f"A server did not become ready; it said: {said[-1] if said else 'nothing'}",
        remedy="Try `specmoe serve` with the same --store and --provider.",
    )


def _address(where: str) -> Address:
    if where.startswith("unix:"):
        return where.removeprefix("unix:")
    host, _, port = where.removeprefix("http://").rpartition(":")
    return [host, int(port)]


def _connected(address: Address) -> socket.socket:
    if isinstance(address, list):
        return socket.create_connection((address[0], address[1]), timeout=READY_SECONDS)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(READY_SECONDS)
    connection.connect(address)
    return connection
