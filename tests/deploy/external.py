"""Programs that are no Python packages: a test that needs one skips where it is missing, and fails under CI.

promtool = require("promtool")
"""

from __future__ import annotations

import os
import shutil

import pytest


def require(program: str) -> str:
    """Path of the program. Skips the test without it; with `CI=true`, where .ci/run installs it, fails."""
    path = shutil.which(program)
    if path is None:
        missing = f"{program} is not installed; .ci/run names its Debian package"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path
