"""The Makefile: what it lists, and what it says where it cannot go on. Nothing is installed here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.external import require

ROOT = Path(__file__).parents[2]
READ_BY_MAKE = ("Makefile", "pyproject.toml", "constraints.txt", "clients/python/pyproject.toml")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a person would, without the variables of a make around the tests."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    command = [require("make"), "--directory", str(folder), "--no-print-directory", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a fresh clone as make reads."""
    for name in READ_BY_MAKE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def installed(clone: Path) -> Path:
    """A clone whose environment make takes for complete."""
    (clone / ".venv").mkdir()
    for stamp in (".python", ".application", ".training", ".development"):
        (clone / ".venv" / stamp).touch()
    return clone


def test_make_alone_lists_every_target(clone: Path) -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (clone / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = [line.split()[1] for line in make(clone).stdout.splitlines()]
    assert sorted(listed) == sorted(phony[1].split())


def test_an_old_python_is_refused_by_name(clone: Path) -> None:
    python = clone / "python3.9"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    python.chmod(0o755)
    done = make(clone, "install", f"PYTHON={python}")
    assert done.returncode != 0
    assert f"specMoE needs Python 3.11 or newer, {python} is Python 3.9.2." in done.stdout
    assert not (clone / ".venv").exists()


def test_a_second_install_does_nothing(installed: Path) -> None:
    assert make(installed, "--question", "install").returncode == 0


@pytest.mark.parametrize("changed", READ_BY_MAKE[1:])
def test_a_changed_requirement_installs_again(installed: Path, changed: str) -> None:
    later = (installed / ".venv/.application").stat().st_mtime + 1
    os.utime(installed / changed, (later, later))
    assert make(installed, "--question", "install").returncode == 1


@pytest.mark.parametrize("model", ["gpt-oss-20b", "deepseek-v2-lite"])
def test_training_asks_for_traces(installed: Path, model: str) -> None:
    done = make(installed, f"train-{model}")
    assert done.returncode != 0
    assert f"Which traces? make train-{model} TRACES=folder" in done.stdout
