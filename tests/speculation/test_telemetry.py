"""Running a predictor leaves nothing behind on the user's machine and tells nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_onnx_runtime_keeps_no_device_id(tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    environment = inherited | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    program = "import speculation.runtime, onnxruntime; onnxruntime.get_available_providers()"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    assert list(tmp_path.rglob("*")) == []
