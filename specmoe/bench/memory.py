"""What ten thousand sequences of streams take: the service's resident memory before and with them.

Each has had a token and is half through the next, so that all it may ever keep has been written to.

    specmoe bench --only memory
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import psutil

from model_store.manifest import Manifest
from specmoe.bench.aims import Aim
from specmoe.bench.parts import Effort
from specmoe.bench.processes import server_process
from specmoe.bench.routing import made_up
from specmoe.bench.stream_client import StreamClient
from specmoe.bench.stream_frames import FORECAST, hello, masked, open_sequences, routing, start
from traces.spec import RoutingSpec

CONNECTIONS = 4
# In one message; a hundred kilobytes or so.
TOGETHER = 250
# Those that bring along what is made but once. Their memory is used again: few, to take little off the rest.
FIRST = 64
MEGABYTE = 1e6
AIM = Aim("resident memory of the service with all of them", 500, "MB")


class StreamMemory:
    """Resident bytes of a `specmoe serve` without and with sequences."""

    def __init__(self, manifest: Manifest, flags: list[str]) -> None:
        self._manifest = manifest
        self._flags = ["--models", f"{manifest.spec.model}@{manifest.version}", *flags]
        self._sequences = self._before = self._after = 0

    def steps(self, effort: Effort) -> int:
        """The start, and the connections."""
        return 1 + CONNECTIONS

    def run(self, effort: Effort) -> Generator[str]:
        """Open them all; yields the name of what comes next."""
        yield "starting a service"
        arguments = ["serve", "--port", "0", *self._flags]
        with (
            tempfile.TemporaryDirectory(prefix="specmoe-bench-") as name,
            server_process("specmoe.cli", arguments, ready="model ready", log=Path(name) / "log") as started,
            contextlib.ExitStack() as opened,
        ):
            process = psutil.Process(started.pid)
            with StreamClient(started.address) as client:
                self._greet(client)
                self._fill(client, range(FIRST))
            before = process.memory_info().rss
            share = effort.sequences // CONNECTIONS
            for number in range(CONNECTIONS):
                yield f"{share} sequences, connection {number + 1} of {CONNECTIONS}"
                client = opened.enter_context(StreamClient(started.address))
                self._greet(client)
                for first in range(0, share, TOGETHER):
                    self._fill(client, range(first, min(first + TOGETHER, share)))
            self._sequences = share * CONNECTIONS
            self._before, self._after = before, process.memory_info().rss

    def report(self) -> dict[str, Any]:
        """Fit for JSON."""
        if not self._after:
            return {}
        return {
            "sequences": self._sequences,
            "before_mb": round(self._before / MEGABYTE, 1),
            "after_mb": round(self._after / MEGABYTE, 1),
            "kilobytes_a_sequence": round((self._after - self._before) / self._sequences / 1e3, 2),
            "aims": [AIM.report(self._after / MEGABYTE)],
        }

    def _greet(self, client: StreamClient) -> None:
        # One expert a layer: what is sent back is not what is measured.
        client.send(masked(hello(self._manifest.spec.model, self._manifest.version, top_n=1)))

    def _fill(self, client: StreamClient, sequences: Sequence[int]) -> None:
        """Open them, tell a token and half of the next, and wait until that has been worked in."""
        half = self._manifest.spec.num_layers // 2
        client.send(masked(open_sequences(sequences)) + filling(self._manifest.spec, sequences, half))
        waiting = len(sequences)
        while waiting:
            for answer in client.receive():
                if answer.kind == FORECAST and answer.first_layer == half:
                    waiting -= answer.count


def filling(spec: RoutingSpec, sequences: Sequence[int], half: int) -> bytes:
    """A whole token and the first `half` layers of another, on sequences that are open."""
    told = b""
    for seed, end in enumerate((spec.num_layers, half)):
        token = made_up(spec, batch=len(sequences), seen=end, seed=seed)
        layers = token.experts[:, :end], token.gates[:, :end]
        told += masked(start(sequences, token.token_ids))
        told += masked(routing(sequences, 0, *layers, spec.num_experts))
    return told
