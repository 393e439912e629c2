"""A real `specmoe serve`, in a process of its own, with the toy model."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def running_service(store: Path, *flags: str) -> Iterator[dict[str, Any]]:
    """Serves the store on a free TCP port, or as the flags say, until the block ends.

    Gives the keyword arguments with which a client reaches it.
    """
    arguments = ["serve", "--store", str(store), "--port", "0", "--provider", "cpu", *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECMOE_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "specmoe.cli", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield _wait_until_ready(process)
    finally:
        process.terminate()
        process.communicate()


def _wait_until_ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stderr is not None
    address, lines = "", []
    for line in process.stderr:
        lines.append(line)
        event = json.loads(line) if line.startswith("{") else {}
        address = event.get("address", address)
        if event.get("message") == "model ready":
            break
    else:
        raise RuntimeError("the service ended: " + "".join(lines))
    return {"uds": address.removeprefix("unix:")} if address.startswith("unix:") else {"base_url": address}
