"""All streams of the service: who is connected, which hub serves whom, what time takes away.

websocket -> Streams.connect -> Connection; `specmoe serve` -> drain

curl localhost:8080/v1/models/gpt-oss-20b/live
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from service.errors import HelloLate, StreamsExhausted
from service.loading import Running
from service.metrics import Metrics
from service.serving import Serving
from service.settings import Settings
from service.stream.connection import Connection, Wire
from service.stream.hub import Hub
from service.stream.live import LiveCollector
from service.stream.messages import Hello, Welcome

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
# How often idle sequences are looked for, and a drain looks whether all are gone.
LOOK_SECONDS = 1.0
DRAIN_LOOK_SECONDS = 0.02
GOING_AWAY = 1001


class Streams:
    """The host of every connection. Belongs to one event loop."""

    def __init__(self, serving: Serving, settings: Settings, metrics: Metrics) -> None:
        self.max_frame_bytes = settings.max_frame_bytes
        self._serving, self._settings, self._metrics = serving, settings, metrics
        self._connections: set[Connection] = set()
        self._hubs: dict[tuple[str, int], Hub] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        metrics.streams.set_function(lambda: len(self._connections))
        metrics.stream_sequences.set_function(self._open_sequences)
        metrics.registry.register(LiveCollector(self._hubs.values))

    def connect(self, wire: Wire) -> Connection:
        """A new connection; one too many is told so and ended."""
        connection = Connection(self, wire)
        full = len(self._connections) >= self._settings.max_streams
        self._connections.add(connection)
        if self._draining:
            connection.close(GOING_AWAY, "the service is stopping")
        elif full:
            connection.refuse(
                StreamsExhausted(
                    f"{len(self._connections) - 1} streams are open, and no more are allowed.",
                    remedy="Use one stream for many sequences, or raise SPECMOE_MAX_STREAMS.",
                )
            )
        else:
            asyncio.get_running_loop().call_later(HELLO_SECONDS, self._check_hello, connection)
        return connection

    async def running(self, hello: Hello) -> Running:
        """The version that a hello means. Raises what `Serving.get` raises."""
        return await self._serving.get(hello.model, hello.version)

    def welcome(self, hello: Hello, running: Running) -> Welcome:
        """What a client is told of the version and of the limits."""
        spec, manifest, settings = running.speculator.spec, running.speculator.manifest, self._settings
        return Welcome(
            tag=hello.tag,
            model=running.model,
            version=running.version,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            uses_token_ids=manifest.uses_token_ids,
            uses_gates=manifest.uses_gates,
            max_sequences=settings.max_stream_sequences,
            max_frame_bytes=settings.max_frame_bytes,
            max_context_tokens=settings.max_context_tokens,
            idle_seconds=settings.stream_idle_seconds,
        )

    def hub(self, running: Running) -> Hub:
        """The hub of a version, made for its first stream."""
        key = (running.model, running.version)
        hub = self._hubs.get(key)
        if hub is None:
            hub = self._hubs[key] = Hub(running, self._settings)
        return hub

    def leave(self, connection: Connection) -> None:
        """A connection ended."""
        self._connections.discard(connection)
        self._forget_hubs()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the connection that wants it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def count(self, outcome: str) -> None:
        """A message was taken or refused."""
        self._metrics.count_message(outcome)

    def hubs(self, model: str) -> list[Hub]:
        """The hubs of a model's versions, newest first."""
        return [hub for key, hub in sorted(self._hubs.items(), reverse=True) if key[0] == model]

    async def run(self) -> None:
        """Let idle sequences expire, until cancelled."""
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, self._settings.stream_idle_seconds / 2))
            try:
                for hub in list(self._hubs.values()):
                    hub.expire()
                self._forget_hubs()
            except Exception:
                log.exception("looking for idle sequences failed")

    async def drain(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Say goodbye to every stream, give them this time to end by themselves, then end them.

        hurry: asked again and again whether there is no time left after all.
        """
        self._draining = True
        end = time.monotonic() + seconds
        for connection in list(self._connections):
            connection.tell(connection.encoding.goodbye(round(seconds * 1000)))
        while self._connections and time.monotonic() < end and not hurry():
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        for connection in list(self._connections):
            connection.close(GOING_AWAY, "the service stopped")

    def _forget_hubs(self) -> None:
        """A version that is served no longer leaves memory with its last stream."""
        used = {other.conversation.hub for other in self._connections if other.conversation}
        for key, hub in list(self._hubs.items()):
            if hub not in used and not hub.slots.in_use and hub.running not in self._serving.loaded(key[0]):
                del self._hubs[key]

    def _open_sequences(self) -> int:
        return sum(hub.slots.in_use for hub in self._hubs.values())

    def _check_hello(self, connection: Connection) -> None:
        if not connection.greeted and connection in self._connections:
            connection.refuse(
                HelloLate(f"No hello came within {HELLO_SECONDS:g} s.", remedy="Send it first, at once.")
            )
