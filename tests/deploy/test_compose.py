"""docker-compose.yml against the compose specification's schema, and what keeps its services confined."""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.settings import read_settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_it_is_what_the_specification_allows() -> None:
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(vendored.read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(COMPOSE)


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_every_service_is_confined(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.keys() >= {"cpus", "mem_limit", "pids_limit"}
    assert not service.get("privileged")


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_ports_are_published_on_loopback_only(service: dict[str, Any]) -> None:
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_a_plain_start_does_not_train() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" not in service] == [
        "specmoe",
        "prometheus",
    ]
    assert SERVICES["training"]["profiles"] == ["training"]


def test_the_service_takes_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = SERVICES["specmoe"]["environment"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = read_settings()
    assert {
        "SPECMOE_HOST": settings.host,
        "SPECMOE_PORT": str(settings.port),
        "SPECMOE_STORE": settings.store,
    } == environment


@pytest.mark.parametrize("service", ["specmoe", "training"])
def test_commands_are_ones_that_specmoe_takes(service: str) -> None:
    name, *flags = SERVICES[service]["command"]
    parser = argparse.ArgumentParser()
    importlib.import_module(f"specmoe.commands.{name}").add_arguments(parser)
    assert parser.parse_args(flags)


def test_prometheus_scrapes_the_port_the_service_listens_on() -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for group in job["static_configs"] for target in group["targets"]]
    assert targets == [f"specmoe:{SERVICES['specmoe']['environment']['SPECMOE_PORT']}"]


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_what_is_mounted_from_the_project_is_there(service: dict[str, Any]) -> None:
    mounted = [volume.split(":")[0] for volume in service["volumes"] if volume.startswith("./")]
    assert all((ROOT / path).is_dir() for path in mounted)
