"""The servers of a measurement: ready when they are needed, and gone afterwards.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from specmoe.errors import BenchError

# [host, port], or the path of a Unix socket.
Address: TypeAlias = list[Any] | str

READY_SECONDS = 60.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Started:
    """A server that is ready."""

    address: Address
    pid: int


@contextlib.contextmanager
def server_process(module: str, arguments: Sequence[str], *, ready: str, log: Path) -> Iterator[Started]:
    """A server until the block ends, once `ready` is a message of its log.

    Raises BenchError where it ends, or refuses what it shall serve.
    """
    with log.open("wb") as written, start_module(module, arguments, stderr=written) as process:
        try:
            yield Started(_address_when_ready(process, ready, log), process.pid)
        finally:
            stop(process)


@contextlib.contextmanager
def server(module: str, arguments: Sequence[str], *, ready: str, log: Path) -> Iterator[Address]:
    """The address of a `server_process`."""
    with server_process(module, arguments, ready=ready, log=log) as started:
        yield started.address


def post(address: Address, path: str, body: bytes) -> bytes:
    """One answer, on a connection of its own. Raises BenchError where it is not 200."""
    connection = http.client.HTTPConnection("service", timeout=READY_SECONDS)
    connection.sock = connect(address)
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


def start_module(module: str, arguments: Sequence[str], **pipes: Any) -> subprocess.Popen[bytes]:
    """A module as a process: with the default settings, and deaf to Ctrl-C, which is for us to act on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECMOE_")}
    return subprocess.Popen(  # noqa: S603  # our own modules
        [sys.executable, "-m", module, *arguments], env=environment, start_new_session=True, **pipes
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asked to end, and made to where it does not."""
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


def connect(address: Address, seconds: float = READY_SECONDS) -> socket.socket:
    """A connection that sends at once, and waits so long for an answer."""
    if isinstance(address, list):
        connection = socket.create_connection((address[0], address[1]), timeout=seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(seconds)
    connection.connect(address)
    return connection
