"""The real app in this process, its lifespan run as a server would, and requests to it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import httpx

from model_store.store import Store
from service.app import create_app
from service.settings import Settings

# Path, body and headers to answer.
Post = Callable[[str, bytes, dict[str, str]], httpx.Response]

FINISHED = [[0, 1], [2, 3], [4, 5], [6, 7]]


@contextlib.asynccontextmanager
async def running_app(
    settings: Settings, store: Store | None = None, *, until_ready: bool = True
) -> AsyncIterator[httpx.AsyncClient]:
    """A client to an app of these settings, whose faults are answered with 500, as by a server."""
    app = create_app(settings, store)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service") as client,
    ):
        if until_ready:
            await wait_for(client, "/readyz", lambda answer: answer.status_code == 200)
        yield client


@contextlib.contextmanager
def app_on_a_thread(settings: Settings) -> Iterator[Post]:
    """Posts to an app that runs on a loop of its own, for hypothesis knows no coroutines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    context = contextlib.AsyncExitStack()
    client = wait(context.enter_async_context(running_app(settings)))
    yield lambda path, body, headers: wait(client.post(path, content=body, headers=headers))
    wait(context.aclose())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def wait_for(client: httpx.AsyncClient, path: str, fulfilled: Any) -> httpx.Response:
    """The first answer of a path that is as wanted; the test's own time limit is the limit."""
    async with asyncio.timeout(30):
        while not fulfilled(answer := await client.get(path)):
            await asyncio.sleep(0.01)
    return answer


def body(*sequences: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A request to the toy: one sequence of which nothing is known, unless others are given."""
    return {"model": "toy", "sequences": list(sequences) or [{}], **options}


async def predict(client: httpx.AsyncClient, *sequences: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    response = await client.post("/v1/predict", json=body(*sequences, **options))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
