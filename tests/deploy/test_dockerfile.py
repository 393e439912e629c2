"""What the Dockerfile tells without being built. deploy/build-image.sh builds it and looks inside."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from service.settings import Settings
from tests.deploy.dockerfile import Stage, stages

ROOT = Path(__file__).parents[2]
STAGES = stages((ROOT / "Dockerfile").read_text())
IMAGES = {name: next(stage for stage in STAGES if stage.name == name) for name in ("service", "training")}


def test_the_service_is_what_a_plain_build_gives() -> None:
    assert STAGES[-1].name == "service"


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_nothing_runs_as_root(image: Stage) -> None:
    assert image.value("USER") == "specmoe"


def test_only_training_takes_the_training_extra() -> None:
    assert [stage.name for stage in STAGES if "[training]" in stage.text] == ["build-training"]
    assert "--from=build-training" in IMAGES["training"].text
    assert "--from=build /opt" in IMAGES["service"].text


def test_every_install_is_pinned() -> None:
    installs = re.findall(
        r"pip --python \S+ install (.*?)(?=\n[A-Z]|\Z)", "\n".join(stage.text for stage in STAGES), re.DOTALL
    )
    assert len(installs) == 2
    assert all("--constraint /src/constraints.txt" in install for install in installs)


def test_its_environment_are_settings() -> None:
    assert {name.removeprefix("SPECMOE_").lower() for name in IMAGES["service"].environment} <= set(
        Settings.model_fields
    )


def test_the_health_check_asks_for_readiness_on_the_port_that_is_exposed() -> None:
    service = IMAGES["service"]
    assert "/readyz" in service.healthcheck[-1]
    assert service.value("EXPOSE") == service.environment["SPECMOE_PORT"]


def test_the_service_is_stopped_gently() -> None:
    assert IMAGES["service"].value("STOPSIGNAL") == "SIGTERM"
    assert json.loads(IMAGES["service"].value("ENTRYPOINT")) == ["specmoe"]


def test_the_build_context_has_all_that_the_wheel_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert let_in >= {
        *packages,
        project["project"]["readme"],
        *project["project"]["license-files"],
        "constraints.txt",
    }
