"""Logs as one JSON object a line, on stderr: what a log collector reads without a grammar.

specmoe serve 2>&1 | jq 'select(.level != "info")'
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import orjson

# What every LogRecord has; the rest came as `extra` and becomes fields of the line.
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, then the record's `extra` fields and, of an exception, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(fields, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def log_to_stderr(level: str) -> None:
    """Send everything from `level` up, uvicorn's lines too, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
