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
OURS = {"specmoe", "specmoe-client"}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "clients/python/pyproject.toml").read_text())["project"]
    extras = [item for extra in project["optional-dependencies"].values() for item in extra]
    return [Requirement(item) for item in [*project["dependencies"], *client["dependencies"], *extras]]


def test_every_pin_is_exact_and_of_no_build() -> None:
    assert [name for name, pin in PINS.items() if not re.fullmatch(r"==[\w.]+", str(pin))] == []


def needed(requirement: Requirement, found: dict[str, set[str]]) -> None:
    """Add what a requirement installs, and what that needs, to `found`: name -> extras seen."""
    name = canonicalize_name(requirement.name)
    extras = {"", *requirement.extras}
    new = extras - found.setdefault(name, set())
    found[name] |= new
    for text in importlib.metadata.requires(name) or () if new else ():
        then = Requirement(text)
        if then.marker is None or any(then.marker.evaluate({"extra": extra}) for extra in new):
            needed(then, found)


def test_what_is_installed_is_what_is_pinned() -> None:
    found: dict[str, set[str]] = {}
    for ours in ("specmoe[dev]", "specmoe-client"):
        needed(Requirement(ours), found)
    installed = {name: importlib.metadata.version(name) for name in found.keys() - OURS}
    drifted = {
        name: version
        for name, version in installed.items()
        if name not in PINS or not PINS[name].contains(version, prereleases=True)
    }
    assert len(installed) > 50
    assert drifted == {}


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_pin_is_one_that_pyproject_says_works(requirement: Requirement) -> None:
    if requirement.name != "specmoe":
        pin = str(PINS[canonicalize_name(requirement.name)]).removeprefix("==")
        assert requirement.specifier.contains(Version(pin), prereleases=True)
