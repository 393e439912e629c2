"""Prometheus: what promtool says of the configuration, and whether the service exports what alerts name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics
from service.problems import KINDS
from service.routes import PREDICT_PATH
from tests.deploy.external import require

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy/prometheus/prometheus.yml"
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
PLAYED = Path(__file__).parent / "alerts.test.yml"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", CONFIG), ("check", "rules", ALERTS), ("test", "rules", PLAYED)],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_promtool_passes(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [require("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_played_firing_and_quiet() -> None:
    played: dict[str, set[bool]] = {}
    for case in yaml.safe_load(PLAYED.read_text())["tests"]:
        for check in case["alert_rule_test"]:
            played.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    assert played == {rule["alert"]: {True, False} for rule in rules()}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alerts_name_metrics_that_the_service_exports(rule: dict[str, Any]) -> None:
    exported = set(re.findall(r"^# TYPE (\w+) ", Metrics().text().decode(), re.MULTILINE))
    named = {name.removesuffix("_bucket") for name in re.findall(r"specmoe_\w+", rule["expr"])}
    assert named <= exported


def test_the_error_share_looks_at_predictions() -> None:
    named = {endpoint for rule in rules() for endpoint in re.findall(r'endpoint="([^"]*)"', rule["expr"])}
    assert named == {PREDICT_PATH}


def test_the_error_share_counts_codes_of_the_services_own_faults() -> None:
    own = {kind.code for kind in KINDS.values() if kind.status >= 500 or kind.status == 429}
    counted = [re.search(r'outcome=~"([\w|]+)"', rule["expr"]) for rule in rules()]
    assert [set(match[1].split("|")) for match in counted if match] == [own]
