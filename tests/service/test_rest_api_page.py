"""docs/rest-api.md says what is so: its table of errors, its metrics, its first example.

.venv/bin/python -m pytest tests/service/test_rest_api_page.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from service.metrics import Metrics
from service.problems import INTERNAL, KINDS
from service.schemas import PREDICT_REQUEST

PAGE = (Path(__file__).parents[2] / "docs" / "rest-api.md").read_text(encoding="utf-8")


def test_the_table_of_errors_has_every_status_and_code() -> None:
    rows = re.findall(r"^\| (\d{3}) \| ([^|]*) \|", PAGE, re.MULTILINE)
    told = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    of_routing = {(404, "not_found"), (405, "method_not_allowed")}
    assert told == {tuple(kind) for kind in KINDS.values()} | of_routing | {tuple(INTERNAL)}


def test_the_table_of_metrics_has_every_metric_with_its_labels() -> None:
    rows = re.findall(r"^\| `(specmoe_\w+)` \|([^|]*)\|", PAGE, re.MULTILINE)
    told = {
        name.removesuffix("_total"): [label for label in labels.strip().split(", ") if label]
        for name, labels in rows
    }
    # Before there is a sample, prometheus-client shows a metric's labels nowhere else.
    metrics = [metric for metric in vars(Metrics()).values() if hasattr(metric, "_labelnames")]
    assert told == {metric._name: list(metric._labelnames) for metric in metrics}


def test_the_smallest_request_is_one() -> None:
    example = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    assert PREDICT_REQUEST.validate_python(example).sequences[0].token_id == 976
