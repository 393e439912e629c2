"""A few seconds of the soak, with the toy: it runs, and finds nothing.

.venv/bin/python benchmarks/soak_stream.py --minutes 10
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.toy_version import toy_store

ROOT = Path(__file__).parents[2]


def test_random_traffic_is_forecast_rightly_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    arguments = [
        "--minutes",
        "0.15",
        "--store",
        str(toy_store(tmp_path)),
        "--model",
        "toy",
        "--json",
        str(result),
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "soak_stream.py", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(result.read_text(encoding="utf-8"))
    assert told["violations"] == []
    assert min(told[name] for name in ("forecasts", "unions", "wrong", "cut", "dropped", "accounts")) > 0
