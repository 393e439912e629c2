"""The report's sections on streams, other model servers and memory, as Markdown.

specmoe bench --only stream servers memory
"""

from __future__ import annotations

from typing import Any

from specmoe.bench.tables import aims_table, p50_p99, table, us


def stream_lines(stream: dict[str, Any]) -> list[str]:
    """From routing to forecast."""
    body = [
        [
            row["case"],
            *p50_p99(row["all"]),
            us(row["start"]["p50_us"]),
            us(stream["steps"][str(row["sequences"])]["p50_us"]),
            us(row["added_us"]) if row["connections"] == 1 else "",
            f"{row['forecasts_per_second']:.0f}",
        ]
        for row in stream["rows"]
    ]
    head = ["", "p50", "p99", "token start p50", "model call p50", "added", "forecasts a second"]
    return [
        "",
        "## The stream, µs",
        "",
        "From sending the routing of a layer, or the start of a token, to having its whole forecast. *model "
        "call*: `Steps.step` with one layer told, for as many sequences as a frame has; *added*: p50 less "
        "that. `Speculator.predict` in the same turns, half of the layers seen: p50 "
        f"{us(stream['predict']['p50_us'])}. The load looks at its sockets again and again, and so does the "
        "service for a millisecond after a message; *client asleep*: the load waits to be woken; *both "
        "asleep*: and the service, too, with `--stream-spin-us 0`.",
        "",
        *table(head, body),
        "",
        *aims_table(stream["aims"]),
    ]


def server_lines(servers: dict[str, Any]) -> list[str]:
    """Other servers beside ours."""
    body = [
        [
            row["server"],
            row["version"],
            *p50_p99(row["connections_1"]),
            us(row["added_us"]),
            us(row["connections_16"]["p50_us"]),
            f"{row['connections_16']['per_second']:.0f}",
        ]
        for row in servers["rows"]
    ]
    head = ["server", "version", "p50", "p99", "added", "16 connections p50", "answers a second"]
    runtimes = sorted({row["onnxruntime"] for row in servers["rows"]})
    skipped = [f"- {other['server']}: {other['note']}" for other in servers["skipped"]]
    return [
        "",
        "## The same predict.onnx behind other model servers, µs",
        "",
        "Each on the server's core, for itself in its turn, over TCP loopback: one sequence, half of its "
        f"layers seen. The model call alone in the same turns: p50 {us(servers['model']['p50_us'])} "
        f"(the step that a stream calls instead: p50 {us(servers['step']['p50_us'])}). *added*: p50 less the "
        "call that it makes. *answers a second*: with 16 connections. "
        f"ONNX Runtime {', '.join(runtimes)} in all of them.",
        "",
        *table(head, body),
        "",
        *aims_table(servers["aims"]),
        *(["", "Skipped:", *skipped] if skipped else []),
    ]


def memory_lines(memory: dict[str, Any]) -> list[str]:
    """Open sequences."""
    return [
        "",
        "## Memory",
        "",
        f"{memory['sequences']:,} sequences of streams, each with a token behind it and half through the "
        f"next: the service's resident memory went from {memory['before_mb']:.0f} to "
        f"{memory['after_mb']:.0f} MB, {memory['kilobytes_a_sequence']:.1f} kB a sequence.",
        "",
        *aims_table(memory["aims"]),
    ]
