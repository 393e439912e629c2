"""Orders to a process that puts load on a server, and what they brought: both ends of the pipe.

The load has a process, and a core, of its own. Orders go in as JSON lines on its stdin, results come out as
JSON lines on its stdout.

    python -m specmoe.bench.load [CORE]
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from specmoe.bench.cores import pin
from specmoe.bench.processes import start_module, stop
from specmoe.errors import BadAnswer, BenchError


class Worker:
    """The end that gives orders."""

    def __init__(self, orders: IO[bytes], results: IO[bytes]) -> None:
        self._orders, self._results = orders, results

    def order(self, **order: Any) -> dict[str, Any]:
        """The result. Raises BenchError where an answer was wrong, or the process ended."""
        try:
            self._orders.write(json.dumps(order).encode() + b"\n")
            self._orders.flush()
            line = self._results.readline()
        except BrokenPipeError:
            line = b""
        result: dict[str, Any] = json.loads(line or b'{"error": "the process that sends requests ended"}')
        if "error" in result:
            raise BenchError(f"The load failed: {result['error']}.", remedy="See what the message says.")
        return result


@contextlib.contextmanager
def worker(module: str, core: int | None) -> Iterator[Worker]:
    """A process on this core that carries out orders until the block ends."""
    arguments = [] if core is None else [str(core)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with start_module(module, arguments, **pipes) as process:
        try:
            if process.stdin and process.stdout:
                yield Worker(process.stdin, process.stdout)
        finally:
            stop(process)


def carry_out(arguments: Sequence[str], action: Callable[..., dict[str, Any]]) -> None:
    """The end that obeys: `action` with the fields of each order, until stdin ends."""
    pin(int(arguments[0]) if arguments else None)
    for line in sys.stdin:
        try:
            result = action(**json.loads(line))
        except (BadAnswer, OSError) as error:
            result = {"error": str(error) or type(error).__name__}
        print(json.dumps(result), flush=True)
