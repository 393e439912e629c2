"""Starts a built image without a docker engine and shows its size, user and contents, and that it answers.

The last step of `deploy/build-image.sh`; alone, for an image that buildah has:

    sudo .venv/bin/python deploy/show_image.py localhost/specmoe:gpu
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY_SECONDS = 60
# The deployed file and the folder of installed packages are root's; run by the image's own user.
LOOK_INSIDE = """
import importlib.metadata, importlib.util, os, sys
names = sorted({found.metadata["Name"] for found in importlib.metadata.distributions()}, key=str.lower)
print(f"{len(names)} distributions: {', '.join(names)}")
faults = [f"{name} is in it" for name in ("torch", "pip", "pyarrow") if importlib.util.find_spec(name)]
faults += ["it runs as root"] if os.getuid() == 0 else []
faults += [f"its user can write to {path}" for path, _, _ in os.walk(sys.prefix) if os.access(path, os.W_OK)]
sys.exit("; ".join(faults) or 0)
"""


def main(image: str) -> int:
    """Show one image. Returns 0 where it is as it must be."""
    config = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
    container = buildah("from", "--pull-never", image)
    try:
        print(f"== {image}: {buildah('images', '--format', '{{.Size}}', image)}, user {config['User']}")
        print(buildah(*inside(container), "sh", "-c", "id; du -sh /opt/specmoe"))
        print(buildah(*inside(container), "python3", "-c", LOOK_INSIDE))
        answer(container, config)
    finally:
        buildah("rm", container)
    print(
        "== no torch, no pip, not root, nothing installed is writable; ready, answering, stopped by SIGTERM"
    )
    return 0


def answer(container: str, config: dict[str, Any]) -> None:
    """Start the image's command, wait for its own health check, ask it something, stop it."""
    environment = {"SPECMOE_HOST": "127.0.0.1", "SPECMOE_PORT": str(free_port())}
    command = [*config["Entrypoint"], *config["Cmd"]]
    check = [*inside(container, environment), *config["Healthcheck"]["Test"][1:]]
    print(f"== {' '.join(command)}")
    with started([*inside(container, environment), *command]) as process:
        until_healthy(check, process)
        base = f"http://127.0.0.1:{environment['SPECMOE_PORT']}"
        print("GET /readyz", fetch(f"{base}/readyz"))
        models = fetch(f"{base}/v1/models")
        print("GET /v1/models", models)
        for entry in json.loads(models)["models"]:
            question = json.dumps(
                {"model": entry["model"], "sequences": [{}], "layers": [0], "top_n": 4}
            ).encode()
            print("POST /v1/predict", fetch(f"{base}/v1/predict", question))


def inside(container: str, environment: dict[str, str] | None = None) -> list[str]:
    """Arguments of buildah that run a command in the container, on this machine's network."""
    variables = [f"--env={name}={value}" for name, value in (environment or {}).items()]
    return ["run", "--isolation", "chroot", *variables, container, "--"]


def buildah(*arguments: str) -> str:
    """Standard output of one buildah command. Exits with its standard error where it fails."""
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"buildah {' '.join(arguments[:2])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs; afterwards it is told to stop, and must do so by itself."""
    process = subprocess.Popen(["buildah", *arguments])
    try:
        yield process
        os.kill(innermost(process.pid), signal.SIGTERM)
        if process.wait(timeout=30):
            sys.exit(f"it ended with status {process.returncode} on SIGTERM.")
    finally:
        process.kill()
        process.wait()


def innermost(pid: int) -> int:
    """The process in the container: buildah hands no signal on, it kills."""
    while children := [child for task in Path(f"/proc/{pid}/task").iterdir() for child in started_by(task)]:
        pid = children[0]
    return pid


def started_by(task: Path) -> list[int]:
    """The processes that one thread has started."""
    return [int(child) for child in (task / "children").read_text().split()]


def until_healthy(check: list[str], process: subprocess.Popen[bytes]) -> None:
    """Wait for the image's health check to pass. Exits where the process ends or time is up."""
    deadline = time.monotonic() + READY_SECONDS
    while subprocess.run(["buildah", *check], capture_output=True).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit("it did not become healthy; its log is above.")
        time.sleep(0.2)


def fetch(url: str, body: bytes | None = None) -> str:
    """The body of an answer, of an error as well."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return str(answer.read(), "utf-8")
    except urllib.error.HTTPError as error:
        sys.exit(f"{url} answered {error.code}: {error.read()!r}")


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
