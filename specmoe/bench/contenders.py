"""Who takes part in a comparison of servers: something that carries out a round of load, and its times.

specmoe bench --only servers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import onnxruntime

from specmoe.bench.flow import Flow
from specmoe.bench.latency import Latency
from specmoe.bench.load import Load
from specmoe.bench.processes import Address, http_request
from specmoe.bench.stream_load import StreamLoad

CONNECTIONS = (1, 16)

# (connections, seconds) -> (microseconds of every answer, seconds in all)
Round: TypeAlias = Callable[[int, float], tuple[list[float], float]]


@dataclass(frozen=True)
class Contender:
    """Who takes part. version: of the server; onnxruntime: of what runs the model in it."""

    title: str
    round: Round
    version: str = ""
    onnxruntime: str = onnxruntime.__version__
    times: dict[int, Latency] = field(default_factory=lambda: {n: Latency() for n in CONNECTIONS})

    def report(self, called: Latency) -> dict[str, Any]:
        """Fit for JSON. called: the model's call for it. added_us: to that, at p50 and one connection."""
        return {
            "server": self.title,
            "version": self.version,
            "onnxruntime": self.onnxruntime,
            **{f"connections_{n}": times.report() for n, times in self.times.items()},
            "added_us": round(self.times[1].percentile_us(50) - called.percentile_us(50), 2),
        }


def requests(storm: Load, address: Address, path: str, body: bytes) -> Round:
    """The same request again and again."""
    request = http_request(path, body)
    return lambda connections, seconds: storm.round(address, request, connections, seconds)


def forecasts(streams: StreamLoad, address: Address, flow: Flow) -> Round:
    """Decoding on the stream."""

    def decode(connections: int, seconds: float) -> tuple[list[float], float]:
        times = streams.round(address, flow, connections, seconds)
        return times.start_us + times.layer_us, times.seconds

    return decode
