"""The machine that a measurement ran on, in words.

specmoe bench --quick
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import onnxruntime

from specmoe.bench.cores import Cores, siblings


def describe(cores: Cores) -> dict[str, Any]:
    """Hardware, versions and how busy the machine was, fit for JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "server_core": cores.server,
        "client_core": cores.client,
        "cores_share_hardware": cores.server is not None and cores.client in siblings(cores.server),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
