"""constraints.txt is the one place for pins: it is complete, exact, and what these tests run with."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PINS = {
    canonicalize_name(pin.name): pin.specifier
    for pin in map(
        Requirement, re.findall(r"^[^#\s].*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
}
# Ours, and the installers that every virtual environment begins with.
UNPINNED = {"specmoe", "specmoe-client", "pip", "setuptools", "wheel"}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "clients/python/pyproject.toml").read_text())["project"]
    extras = [item for extra in project["optional-dependencies"].values() for item in extra]
    return [Requirement(item) for item in [*project["dependencies"], *client["dependencies"], *extras]]


def test_every_pin_is_exact_and_of_no_build() -> None:
    assert [name for name, pin in PINS.items() if not re.fullmatch(r"==[\w.]+", str(pin))] == []


def test_what_is_installed_is_what_is_pinned() -> None:
    installed = {
        canonicalize_name(distribution.metadata["Name"]): distribution.version
        for distribution in importlib.metadata.distributions()
    }
    drifted = {
        name: version
        for name, version in installed.items()
        if name not in UNPINNED and (name not in PINS or not PINS[name].contains(version, prereleases=True))
    }
    assert drifted == {}


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_pin_is_one_that_pyproject_says_works(requirement: Requirement) -> None:
    if requirement.name != "specmoe":
        pin = str(PINS[canonicalize_name(requirement.name)]).removeprefix("==")
        assert requirement.specifier.contains(Version(pin), prereleases=True)
