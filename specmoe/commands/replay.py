"""Play a trace through a running service, as a model server would: ask, prefetch, route, layer by layer.

    specmoe replay test.npz --model gpt-oss-20b
    specmoe replay test.npz --model gpt-oss-20b@2 --uds /run/specmoe.sock --cache-share 0.125 --every 1
    specmoe replay test.npz --model gpt-oss-20b --coverage 0.9 --adapt

Prints recall by distance (with --coverage: how often sets held all routed experts, and their size), the hit
rate of a simulated expert cache without and with forecasts, and the latency that a client sees. Over the
stream, routing is told once, as it happens. Over REST (--rest) the service keeps nothing between requests, so
each question carries the last finished tokens again (--context-tokens): more of them are better forecasts and
longer requests. One sequence is played at a time. Ctrl-C ends it and prints what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specmoe.errors import ReplayError
from specmoe.replay import Replay
from traces.files import load
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace

if TYPE_CHECKING:
    from specmoe_client import Client

    from specmoe.replayed_service import ReplayedService
    from specmoe.replayed_stream import ReplayedStream

SHOWN_DISTANCES = ("start", "1", "2", "4", "8", "16", "32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("trace", type=Path, metavar="FILE", help="a trace file or a folder of them")
    add("--model", required=True, metavar="NAME[@VERSION]", help="VERSION: a number or an alias")
    add("--url", default="http://127.0.0.1:8080", help="where the service listens (%(default)s)")
    add("--uds", metavar="PATH", help="its Unix socket, instead of TCP")
    add("--rest", action="store_true", help="ask over REST instead of the stream")
    add("--cache-share", type=float, default=0.25, help="share of all experts that is resident (%(default)s)")
    add("--top-n", type=_positive, metavar="N", help="experts of a layer to prefetch (the model's top-k)")
    add("--coverage", type=float, metavar="P", help="prefetch sets made to hold all routed experts so often")
    add("--adapt", action="store_true", help="have these sets learn from their misses")
    add(
        "--every",
        type=_natural,
        default=4,
        metavar="N",
        help="ask at token start and after every N layers; 0: only at token start (%(default)s)",
    )
    add(
        "--context-tokens",
        type=_natural,
        default=8,
        metavar="N",
        help="finished tokens sent with each question over REST (%(default)s)",
    )
    add("--limit", type=_positive, metavar="N", help="play the first N tokens only")
    add(
        "--timeout-ms",
        type=_positive,
        default=100,
        help="what comes later counts as unanswered (%(default)s)",
    )
    add("--json", type=Path, metavar="OUT", help="write the numbers there")


def run(args: argparse.Namespace) -> int:
    _require_client()
    from specmoe_client import ClientError

    _check(args)
    trace = load(args.trace)
    try:
        report = _replay(args, trace)
    except ClientError as error:
        raise ReplayError(error.message, remedy=error.remedy) from error
    print("\n".join(_text(report, trace.spec)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["complete"] else 130


def _check(args: argparse.Namespace) -> None:
    """Raises ReplayError where flags contradict each other."""
    if args.coverage is not None and args.top_n is not None:
        raise ReplayError(
            f"--top-n {args.top_n} and --coverage {args.coverage} came together.",
            remedy="Give one of them, or neither.",
        )
    if args.adapt and (args.coverage is None or args.rest):
        raise ReplayError(
            "--adapt is for coverage sets, over the stream.",
            remedy="Give --coverage 0.9 with it, and no --rest.",
        )


def _require_client() -> None:
    if importlib.util.find_spec("specmoe_client") is None:
        raise ReplayError(
            "replay asks through the Python client, which is not installed.",
            remedy="Install it from the repository: pip install ./clients/python",
        )


def _replay(args: argparse.Namespace, trace: RoutingTrace) -> dict[str, Any]:
    from specmoe_client import Client

    from specmoe.replayed_service import check_fit

    model, _, version = args.model.partition("@")
    prefetch = None if args.coverage is not None else args.top_n or trace.spec.top_k
    with Client(args.url, uds=args.uds, timeout_ms=args.timeout_ms) as client:
        check_fit(client.models(), model, trace.spec)
        asked = {
            "model": model,
            "version": int(version) if version.isdecimal() else version or None,
        }
        if prefetch is None:
            asked |= {"coverage": args.coverage} | ({"adapt": True} if args.adapt else {})
        else:
            asked |= {"top_n": min(max(prefetch, 2 * trace.spec.top_k), trace.spec.num_experts)}
        with _service(args, client, trace, asked) as service:
            replay = Replay(
                trace, service.ask, every=args.every, prefetch=prefetch, cache_share=args.cache_share
            )
            complete = _play(replay, args.limit)
    return {"model": model, **service.report(), **replay.report(), "complete": complete}


@contextlib.contextmanager
def _service(
    args: argparse.Namespace, client: Client, trace: RoutingTrace, asked: dict[str, Any]
) -> Iterator[ReplayedService | ReplayedStream]:
    """Whatever answers: the stream, or REST."""
    from specmoe_client import Stream

    from specmoe.replayed_service import ReplayedService
    from specmoe.replayed_stream import ReplayedStream

    if args.rest:
        yield ReplayedService(client, trace, context_tokens=args.context_tokens, **asked)
        return
    with Stream(args.url, uds=args.uds, every=args.every, **asked) as stream:
        if not stream.ready():
            raise stream.last_failure or ReplayError("The stream did not open.", remedy="See its log.")
        yield ReplayedStream(stream, trace, timeout_ms=args.timeout_ms)


def _play(replay: Replay, limit: int | None) -> bool:
    """Every token up to the limit, with a progress bar; False where Ctrl-C ended it."""
    from tqdm import tqdm

    trace = replay.trace
    count = min(limit or trace.num_tokens, trace.num_tokens)
    first = np.repeat(trace.starts[:-1], np.diff(trace.starts))  # [N], first token of each token's sequence
    try:
        for token in tqdm(range(count), desc="replay", unit="token"):
            replay.play(token, int(first[token]))
    except KeyboardInterrupt:
        return False
    return True


def _text(report: dict[str, Any], spec: RoutingSpec) -> list[str]:
    versions = ", ".join(map(str, report["versions"])) or "none"
    unanswered = sum(report["unanswered"].values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["unanswered"].items())
    end = "" if report["complete"] else ", interrupted"
    context = report["context_tokens"]
    way = "over the stream" if context is None else f"with up to {context} finished tokens of context"
    return [
        f"{report['model']} (version {versions}), {report['tokens']} tokens{end},"
        f" asked {len(report['questions_after_layers'])} times each, {way}",
        *(_recall_lines(report["recall"], spec.top_k) if report["recall"] else []),
        *(_coverage_lines(report["coverage"]) if report["coverage"] else []),
        *_cache_lines(report["cache"]),
        "",
        "latency, ms    " + "   ".join(f"{name} {value:.2f}" for name, value in report["latency_ms"].items()),
        f"unanswered     {unanswered} of {unanswered + report['answered']}"
        + (f" ({reasons})" if reasons else ""),
    ]


def _recall_lines(recall: dict[str, dict[str, float]], top_k: int) -> list[str]:
    shown = [(name, recall[name]) for name in SHOWN_DISTANCES if name in recall]
    return [
        "",
        f"{'distance':<14} {f'recall@{top_k}':>10} {f'recall@{2 * top_k}':>10}",
        *(f"{name:<14} {row['recall_at_k']:>10.3f} {row['recall_at_2k']:>10.3f}" for name, row in shown),
    ]


def _coverage_lines(coverage: dict[str, dict[str, float]]) -> list[str]:
    shown = [(name, coverage[name]) for name in (*SHOWN_DISTANCES, "all") if name in coverage]
    return [
        "",
        f"{'distance':<14} {'covered':>10} {'set size':>10}",
        *(f"{name:<14} {row['covered']:>10.3f} {row['mean_set_size']:>10.1f}" for name, row in shown),
    ]


def _cache_lines(cache: dict[str, Any]) -> list[str]:
    title = f"{cache['experts_resident']} of {cache['experts']} experts resident"
    rows = [("LRU", cache["lru"]), ("LRU and forecasts", cache["lru_and_forecast"])]
    return [
        "",
        f"{title:<32} {'hit rate':>9} {'on demand':>10} {'ahead':>8} {'used':>8} {'wasted':>8}",
        *(
            f"{name:<32} {row['hit_rate']:>9.3f} {row['fetched_on_demand']:>10} {row['fetched_ahead']:>8}"
            f" {row['fetched_ahead_used']:>8} {row['fetched_ahead_wasted']:>8}"
            for name, row in rows
        ),
    ]


def _natural(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number
