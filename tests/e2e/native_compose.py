"""A service of docker-compose.yml as a process of this machine: its command and environment, other addresses.

with running(native("specmoe", ["specmoe"], {"0.0.0.0": "127.0.0.1", "8080": "41234"}), log):
    ...
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.deploy.dockerfile import stages

ROOT = Path(__file__).parents[2]
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
IMAGE = stages((ROOT / "Dockerfile").read_text())[-1]


@dataclass(frozen=True)
class Native:
    """What a container would run."""

    arguments: list[str]
    environment: dict[str, str]


def native(name: str, entrypoint: list[str], replaced: Mapping[str, str]) -> Native:
    """A service of the compose file. replaced: addresses and paths of containers -> those of this machine."""
    service = SERVICES[name]
    return Native(
        [*entrypoint, *(_replace(word, replaced) for word in service["command"])],
        {key: _replace(value, replaced) for key, value in service.get("environment", {}).items()},
    )


def _replace(text: str, replaced: Mapping[str, str]) -> str:
    for there, here in replaced.items():
        text = text.replace(there, here)
    return text


def image_entrypoint() -> list[str]:
    """The service image's entry point."""
    return list(json.loads(IMAGE.value("ENTRYPOINT")))


@contextmanager
def running(service: Native, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The service while it runs; whatever happens, it is ended."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPECMOE_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            service.arguments, env=inherited | service.environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def free_port() -> str:
    """A port of loopback that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
