"""Tables and their cells, as Markdown that can be read as it stands.

specmoe bench --markdown bench.md
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: list[str], body: Iterable[list[str]]) -> list[str]:
    """Cells padded, to be read as it stands: the first column to the left, numbers to the right."""
    rows = [head, *body]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [_line(row, widths) for row in (head, rule, *rows[1:])]


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    padded = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]
    return f"| {' | '.join(padded)} |"


def p50_p99(latency: dict[str, float]) -> tuple[str, str]:
    """Two cells."""
    return us(latency["p50_us"]), us(latency["p99_us"])


def us(value: float) -> str:
    """Three digits or so are all that a measured time is worth."""
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def aims_table(aims: Sequence[dict[str, Any]]) -> list[str]:
    """What `Aim.report` gave, each met or missed."""
    body = [
        [
            aim["what"],
            _with_unit(aim["measured"], aim["unit"]),
            f"{'≥' if aim['at_least'] else '≤'} {_with_unit(aim['limit'], aim['unit'])}",
            verdict(aim["met"]),
        ]
        for aim in aims
    ]
    return table(["aim", "measured", "limit", ""], body) if aims else []


def verdict(met: bool) -> str:
    """One word."""
    return "met" if met else "missed"


def _with_unit(value: float, unit: str) -> str:
    return f"{value:.2f} ×" if unit == "×" else f"{value:.0f} {unit}".rstrip()
