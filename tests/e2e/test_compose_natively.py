"""What `docker compose up` starts, started here: the service on a toy store, and Prometheus reading it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.external import require
from tests.e2e.native_compose import IMAGE, ROOT, Native, free_port, image_entrypoint, native, running
from tests.toy_version import toy_store

PREDICTIONS = 7
SPECMOE = str(Path(sys.executable).with_name("specmoe"))


def until(ask: Callable[[], Any], log: Path, seconds: float = 30.0) -> Any:
    """The first answer that is neither empty nor a refused connection. Fails with the log once time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answer := ask():
                return answer
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail(f"nothing after {seconds} s; the log:\n{log.read_text()}")


def fetch(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


class Deployment:
    """The service after a few predictions, and Prometheus."""

    def __init__(self, service: str, prometheus: str, log: Path) -> None:
        self.service = service
        self.prometheus = prometheus
        self.log = log

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus answers, once it has an answer."""
        parameters = urllib.parse.urlencode({"query": expression})
        url = f"{self.prometheus}/api/v1/query?{parameters}"
        found: list[dict[str, Any]] = until(lambda: fetch(url)["data"]["result"], self.log)
        return found


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("compose")
    port, prometheus_port = free_port(), free_port()
    log, prometheus_log = folder / "service.log", folder / "prometheus.log"
    moved = {"0.0.0.0": "127.0.0.1", "8080": port, "/store": str(toy_store(folder))}
    prometheus = prometheus_natively(folder, f"127.0.0.1:{port}", prometheus_port)
    service = native("specmoe", [SPECMOE, *image_entrypoint()[1:]], moved)
    with running(service, log):
        until(lambda: subprocess.run(health_check(), env=service.environment).returncode == 0, log)
        base = f"http://127.0.0.1:{port}"
        for _ in range(PREDICTIONS):
            fetch(f"{base}/v1/predict", {"model": "toy", "sequences": [{"token_id": 1}]})
        with running(prometheus, prometheus_log):
            yield Deployment(base, f"http://127.0.0.1:{prometheus_port}", prometheus_log)


def prometheus_natively(folder: Path, target: str, port: str) -> Native:
    """Prometheus with the deployed configuration; nothing but the target's address differs."""
    program = require("prometheus")
    config = Path(shutil.copytree(ROOT / "deploy/prometheus", folder / "prometheus"))
    scrape = config / "prometheus.yml"
    assert scrape.read_text().count("specmoe:8080") == 1
    scrape.write_text(scrape.read_text().replace("specmoe:8080", target))
    moved = {"/etc/prometheus": str(config), "path=/prometheus": f"path={folder / 'data'}"}
    return native("prometheus", [program, f"--web.listen-address=127.0.0.1:{port}"], moved)


def health_check() -> list[str]:
    return [sys.executable, *IMAGE.healthcheck[1:]]


def test_the_health_check_fails_where_nothing_listens() -> None:
    done = subprocess.run(health_check(), env={"SPECMOE_PORT": free_port()}, stderr=subprocess.DEVNULL)
    assert done.returncode != 0


def test_prometheus_reaches_the_service(deployment: Deployment) -> None:
    [up] = deployment.query('up{job="specmoe"}')
    assert up["value"][1] == "1"


def test_prometheus_has_every_prediction_in_the_latency_histogram(deployment: Deployment) -> None:
    [count] = deployment.query('specmoe_request_seconds_count{model="toy", version="2"}')
    assert count["value"][1] == str(PREDICTIONS)
    [everything] = deployment.query('specmoe_request_seconds_bucket{model="toy", le="+Inf"}')
    assert everything["value"][1] == str(PREDICTIONS)


def test_prometheus_counts_predictions_where_the_alerts_look(deployment: Deployment) -> None:
    [counted] = deployment.query('specmoe_requests_total{endpoint="/v1/predict", outcome="ok"}')
    assert counted["value"][1] == str(PREDICTIONS)
    [ready] = deployment.query('specmoe_model_ready{job="specmoe"}')
    assert ready["value"][1] == "1"


def test_prometheus_has_taken_the_alerts_and_none_fires(deployment: Deployment) -> None:
    [group] = until(lambda: fetch(f"{deployment.prometheus}/api/v1/rules")["data"]["groups"], deployment.log)
    deployed = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in deployed]
    assert "firing" not in {rule["state"] for rule in group["rules"]}
