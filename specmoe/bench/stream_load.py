"""The load of a stream: connections that decode token by token, each waiting for one forecast at a time.

Like `specmoe.bench.load` one thread, plain sockets and a process of its own; frames are made before the time
is taken, and of an answer no more is read than which forecast it is.

    python -m specmoe.bench.stream_load [CORE]
"""

from __future__ import annotations

import contextlib
import selectors
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from specmoe.bench.flow import Flow, opening, turns
from specmoe.bench.model_time import INPUTS
from specmoe.bench.orders import Worker, carry_out, worker
from specmoe.bench.polling import awaited
from specmoe.bench.processes import Address
from specmoe.bench.stream_client import StreamClient
from specmoe.bench.stream_frames import FORECAST
from specmoe.errors import BadAnswer


@dataclass(frozen=True)
class Times:
    """Microseconds from sending to the whole forecast: at token start, after a layer; and seconds in all."""

    start_us: list[float]
    layer_us: list[float]
    seconds: float


class StreamLoad:
    """Decoding on order, by a process of its own."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def round(
        self, address: Address, flow: Flow, connections: int, seconds: float, *, asleep: bool = False
    ) -> Times:
        """What `decode` gives. Raises BenchError where an answer was wrong."""
        order = {"address": address, "flow": asdict(flow), "connections": connections, "seconds": seconds}
        return Times(**self._worker.order(**order, asleep=asleep))


@contextlib.contextmanager
def stream_load(core: int | None) -> Iterator[StreamLoad]:
    """The load, on this core, until the block ends."""
    with worker("specmoe.bench.stream_load", core) as started:
        yield StreamLoad(started)


class Decoder:
    """One connection, one frame under way. turn: the next one, of all tokens' turns."""

    def __init__(self, client: StreamClient, flow: Flow, token: int) -> None:
        self.client = client
        self.turn = token * flow.num_layers
        self._layers, self._sequences = flow.num_layers, flow.sequences
        self._turns = turns(flow)
        self._waiting = 0
        self._open(opening(flow, token))

    def send(self) -> None:
        """The next turn."""
        self._waiting = self._sequences
        self.client.send(self._turns[self.turn % len(self._turns)])

    def receive(self) -> bool:
        """Whether the forecast is whole now. Raises BadAnswer where another message came."""
        for answer in self.client.receive():
            if answer.kind != FORECAST or answer.first_layer != self.turn % self._layers:
                raise BadAnswer(f"expected forecast {self.turn % self._layers}, got {answer!r:.300}")
            self._waiting -= answer.count
        if self._waiting:
            return False
        self.turn += 1
        return True

    def _open(self, frames: bytes) -> None:
        """Greet, and wait for the forecast of the last layer alone: others may have been overtaken."""
        self.client.send(frames)
        waiting = self._sequences
        while waiting:
            for answer in self.client.receive():
                if answer.kind == FORECAST and answer.first_layer == self._layers - 1:
                    waiting -= answer.count


def decode(address: Address, flow: Flow, connections: int, seconds: float, *, asleep: bool = False) -> Times:
    """So many connections decode for so long. asleep: see `awaited`. Raises BadAnswer, OSError."""
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(StreamClient(address)) for _ in range(connections)]
        decoders = [Decoder(client, flow, number % INPUTS) for number, client in enumerate(clients)]
        return _decoded(decoders, flow.num_layers, seconds, asleep)


def _decoded(decoders: list[Decoder], layers: int, seconds: float, asleep: bool) -> Times:
    times: tuple[list[float], list[float]] = [], []
    sent = [0.0] * len(decoders)
    clock = time.perf_counter
    with selectors.DefaultSelector() as selector:
        for number, decoder in enumerate(decoders):
            selector.register(decoder.client.socket, selectors.EVENT_READ, number)
        began = clock()
        for number, decoder in enumerate(decoders):
            sent[number] = clock()
            decoder.send()
        under_way = len(decoders)
        while under_way:
            for key in awaited(selector, asleep=asleep):
                decoder = decoders[key.data]
                start = decoder.turn % layers == 0
                if not decoder.receive():
                    continue
                now = clock()
                times[0 if start else 1].append((now - sent[key.data]) * 1e6)
                if now - began < seconds:
                    sent[key.data] = clock()
                    decoder.send()
                else:
                    under_way -= 1
        return Times(*times, clock() - began)


def _carried_out(
    address: Address, flow: dict[str, Any], connections: int, seconds: float, asleep: bool
) -> dict[str, Any]:
    return asdict(decode(address, Flow(**flow), connections, seconds, asleep=asleep))


if __name__ == "__main__":
    carry_out(sys.argv[1:], _carried_out)
