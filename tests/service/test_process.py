"""`specmoe serve` as a process: over TCP and a Unix socket, stopped while it works, started wrongly.

.venv/bin/python -m pytest tests/service/test_process.py
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.errors import AddressUnavailable
from service.listening import address, beyond_this_machine, listening
from service.settings import Settings
from tests.service.in_process import body

COMMAND = [sys.executable, "-m", "specmoe.cli", "serve", "--provider", "cpu"]
REQUEST = json.dumps(body()).encode()
HEAD = (
    b"POST /v1/predict HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(REQUEST)
)


class Process:
    """A running `specmoe serve` that is ready. `events`: what it has logged."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen([*COMMAND, *flags], stderr=subprocess.PIPE, text=True)
        self.events: list[dict[str, object]] = []
        self.wait_for("model ready")

    def wait_for(self, message: str) -> dict[str, object]:
        """The next event with that message."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.events.append(json.loads(line))
            if self.events[-1]["message"] == message:
                return self.events[-1]
        raise AssertionError(f"ended without {message!r}: {self.events}")

    @property
    def address(self) -> str:
        return str(next(event["address"] for event in self.events if "address" in event))

    def stop(self) -> int:
        """Send SIGTERM and wait. Gives the exit status."""
        self.process.terminate()
        self.process.communicate(timeout=30)
        return self.process.returncode


@contextlib.contextmanager
def serve(store: Path, *flags: str) -> Iterator[Process]:
    process = Process("--store", str(store), *flags)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.stop()


def client_of(process: Process) -> httpx.Client:
    if process.address.startswith("unix:"):
        transport = httpx.HTTPTransport(uds=process.address.removeprefix("unix:"))
        return httpx.Client(transport=transport, base_url="http://service")
    return httpx.Client(base_url=process.address)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_process_answers_over_a_socket_and_ends_in_order(
    shared_store: Path, tmp_path: Path, kind: str
) -> None:
    uds = tmp_path / "s.sock"
    flags = ["--port", "0"] if kind == "tcp" else ["--uds", str(uds)]
    with serve(shared_store, *flags) as process:
        with client_of(process) as client:
            assert client.get("/readyz").status_code == 200
            assert client.post("/v1/predict", json=body()).json()["version"] == 2
        assert process.stop() == 0
    assert not uds.exists()


def test_the_start_is_told_in_the_log(shared_store: Path) -> None:
    with serve(shared_store, "--port", "0", "--models", "toy@1") as process:
        listening = next(event for event in process.events if event["message"] == "listening")
        ready = process.events[-1]
    assert (listening["store"], listening["models"]) == (str(shared_store), ["toy@1"])
    assert (ready["model"], ready["version"], ready["provider"]) == ("toy", 1, "cpu")
    assert {"provider_reason", "load_seconds"} <= set(ready)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_request_that_has_begun_is_answered_before_the_process_ends(
    shared_store: Path, stop: signal.Signals
) -> None:
    with serve(shared_store, "--port", "0") as process:
        port = int(process.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(HEAD + REQUEST[:5])
            with client_of(process) as client:  # by its answer, the connection before it has been taken too
                assert client.get("/livez").status_code == 200
            process.process.send_signal(stop)
            process.wait_for("Shutting down")
            connection.sendall(REQUEST[5:])
            answer = connection.makefile("rb").read()
        process.process.communicate(timeout=30)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b'"model":"toy"' in answer
    assert process.process.returncode == (0 if stop == signal.SIGTERM else 130)


def test_a_second_process_cannot_take_the_port_or_the_socket(shared_store: Path, tmp_path: Path) -> None:
    uds = str(tmp_path / "s.sock")
    with serve(shared_store, "--uds", uds), serve(shared_store, "--port", "0") as tcp:
        port = tcp.address.rpartition(":")[2]
        for flags in (["--uds", uds], ["--port", port]):
            assert "Address already in use. Another process listens there" in refused(
                "--store", str(shared_store), *flags
            )


def refused(*flags: str, **variables: str) -> str:
    """What `specmoe serve` says where it does not start."""
    done = subprocess.run(
        [*COMMAND, *flags],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_start_that_cannot_succeed_says_why(shared_store: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "There is no store at" in refused("--store", str(tmp_path / "missing"))
    assert "holds no version of any model. Publish one" in refused("--store", str(empty))
    assert "No version of other" in refused("--store", str(shared_store), "--models", "other")
    assert "toy has no version 9. Choose one of" in refused("--store", str(shared_store), "--models", "toy@9")
    assert "did you mean SPECMOE_PORT?" in refused(SPECMOE_PROT="1")


def test_accepted_connections_do_not_wait_for_acknowledgements() -> None:
    with listening(Settings(port=0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with listening(Settings(uds=path)):
        assert stat.S_ISSOCK(path.stat().st_mode)
    assert not path.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(host="no.such.host.invalid"), "Cannot listen on no.such.host.invalid:8080"),
        (Settings(host="192.0.2.1", port=0), "This machine has no such address"),
        (Settings(uds=Path(__file__)), "is a file, no socket. Choose another path"),
        (Settings(uds=Path("/no/such/folder/s.sock")), "Cannot listen on /no/such/folder/s.sock"),
        (Settings(uds=Path("/tmp") / ("s" * 200)), "Cannot listen on /tmp/sss"),
    ],
    ids=["host", "address", "file", "folder", "path too long"],
)
def test_an_address_that_cannot_be_listened_on_is_named(settings: Settings, message: str) -> None:
    with pytest.raises(AddressUnavailable, match=message), listening(settings):
        pass


@pytest.mark.parametrize(
    ("host", "beyond"), [("127.0.0.1", False), ("0.0.0.0", True)], ids=["loopback", "all"]
)
def test_only_loopback_stays_within_the_machine(host: str, beyond: bool) -> None:
    with listening(Settings(host=host, port=0)) as listener:
        assert beyond_this_machine(listener) == beyond
        assert httpx.URL(address(listener)).port == listener.getsockname()[1]
