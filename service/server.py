"""uvicorn's server, with time for streams: it would close their connections as soon as it is told to stop.

specmoe serve
"""

from __future__ import annotations

import socket

import uvicorn

from service.stream.host import Streams


class Server(uvicorn.Server):
    """Drains streams before it shuts down. seconds: how long they are given."""

    def __init__(self, config: uvicorn.Config, streams: Streams, seconds: float) -> None:
        super().__init__(config)
        self._streams, self._seconds = streams, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, let streams end by themselves, then whatever uvicorn does."""
        for server in self.servers:
            server.close()
        await self._streams.drain(self._seconds, lambda: self.force_exit)
        await super().shutdown(sockets)
