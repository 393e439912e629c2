"""Log lines are JSON, whatever is logged.

.venv/bin/python -m pytest tests/service/test_logs.py
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from service.logs import JsonFormatter


def line(message: str, *args: object, exc_info: Any = None, **extra: object) -> dict[str, Any]:
    logger = logging.getLogger("somewhere")
    record = logger.makeRecord(
        "somewhere", logging.WARNING, "file.py", 3, message, args, exc_info, extra=extra
    )
    text = JsonFormatter().format(record)
    assert "\n" not in text
    fields: dict[str, Any] = json.loads(text)
    return fields


def test_a_line_tells_when_how_grave_where_and_what() -> None:
    fields = line("%s of %s", 3, 4)
    assert (fields["level"], fields["logger"], fields["message"]) == ("warning", "somewhere", "3 of 4")
    assert fields["time"].endswith("+00:00")


def test_extra_fields_stand_beside_the_message() -> None:
    assert line("done", model="toy", version=3)["version"] == 3


def test_a_traceback_stays_on_its_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        assert "first\nsecond" in line("failed", exc_info=sys.exc_info())["traceback"]


@pytest.mark.parametrize(
    "value", [b"bytes", {1: 2}, {"set"}, object(), ValueError("x")], ids=lambda v: type(v).__name__
)
def test_whatever_is_logged_becomes_json(value: object) -> None:
    assert "value" in line("odd", value=value)
