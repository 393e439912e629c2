"""What was measured, for people: the report as Markdown tables.

specmoe bench --markdown bench.md
"""

from __future__ import annotations

from typing import Any

from specmoe.bench.report_streams import memory_lines, server_lines, stream_lines
from specmoe.bench.tables import p50_p99, table, us, verdict

NAME_OF_TRANSPORT = {"tcp": "TCP loopback", "unix": "Unix socket"}


def markdown(report: dict[str, Any]) -> str:
    """The whole report of `specmoe.commands.bench`, as far as it got."""
    lines = [
        f"# {report['model']}, version {report['version']}, on {report['provider']}",
        *_machine_lines(report["machine"]),
        *([] if report["complete"] else ["", "Interrupted: these are the numbers up to then."]),
    ]
    if report.get("model_time"):
        lines += _model_lines(report["model_time"])
    if report.get("rest"):
        lines += _rest_lines(report["rest"])
    for part, lines_of in (("stream", stream_lines), ("servers", server_lines), ("memory", memory_lines)):
        if report.get(part):
            lines += lines_of(report[part])
    return "\n".join(lines) + "\n"


def _machine_lines(machine: dict[str, Any]) -> list[str]:
    loads = " / ".join(f"{load:.2f}" for load in machine["load_average_at_start"])
    lines = [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; Python {machine['python']}, "
        f"ONNX Runtime {machine['onnxruntime']}; load average at start {loads} (1 / 5 / 15 min).",
    ]
    if machine["server_core"] is None:
        return [*lines, "Not pinned: fewer than two cores, or a system that cannot pin."]
    shared = ", the same piece of hardware" if machine["cores_share_hardware"] else ""
    return [
        *lines,
        f"Model and servers pinned to core {machine['server_core']}, the load to core "
        f"{machine['client_core']}{shared}.",
    ]


def _model_lines(rows: list[dict[str, Any]]) -> list[str]:
    body = [
        [
            row["case"],
            str(row["batch"]),
            *p50_p99(row["speculator"]),
            *p50_p99(row["session"]),
            us(row["speculator"]["p50_us"] - row["session"]["p50_us"]),
            us(row["speculator"]["p50_us"] / row["batch"]),
        ]
        for row in rows
    ]
    head = ["one call", "batch", "p50", "p99", "session p50", "session p99", "added", "p50 a sequence"]
    return [
        "",
        "## The model alone, µs",
        "",
        "One thread. *session*: ONNX Runtime on the same inputs; *added*: what `speculation/` adds at p50.",
        "",
        *table(head, body),
    ]


def _rest_lines(rest: dict[str, Any]) -> list[str]:
    model = rest["model"]
    body = [
        [
            NAME_OF_TRANSPORT[row["transport"]],
            str(row["connections"]),
            *p50_p99(row["service"]),
            f"{row['service']['per_second']:.0f}",
            *p50_p99(row["bare"]),
            f"{row['bare']['per_second']:.0f}",
            f"{row['ratio']:.2f}",
            verdict(row["ratio"] <= rest["aim"]),
        ]
        for row in rest["rows"]
    ]
    head = [
        "transport",
        "connections",
        "p50",
        "p99",
        "a second",
        "bare p50",
        "bare p99",
        "bare a second",
        "ratio",
    ]
    return [
        "",
        "## REST, µs",
        "",
        f"One sequence, {rest['layers_seen']} layers seen with gates, no context, all others wanted: "
        f"{rest['request_bytes']} bytes there, {rest['answer_bytes']} back. *bare*: a FastAPI endpoint that "
        "checks the same body with the same pydantic model and gives the same bytes. The model alone in the "
        f"same turns: p50 {us(model['p50_us'])}, p99 {us(model['p99_us'])}. *ratio*: p50 / (bare p50 + "
        "connections × model p50), since one process answers one request after the other.",
        "",
        *table([*head, f"aim ≤ {rest['aim']}"], body),
    ]
