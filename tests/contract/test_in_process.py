"""The real asynchronous client against the real app in one process, by httpx's ASGI transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from specmoe_client import AnswerLate, AsyncClient, RequestInvalid, Sequence, ServiceUnavailable

from service.app import create_app
from service.settings import Settings


@asynccontextmanager
async def client_of(settings: Settings) -> AsyncIterator[AsyncClient]:
    """A client of an app that is up; its models may still be loading."""
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with AsyncClient("http://app", transport=transport, timeout_ms=10_000) as client:
            yield client


def ask(store: Path, question: Callable[[AsyncClient], Awaitable[Any]], **settings: Any) -> Any:
    """The answer to a question once the service is ready."""

    async def run() -> Any:
        async with client_of(Settings(store=str(store), provider="cpu", **settings)) as client:
            while not await client.ready():
                await asyncio.sleep(0.01)
            return await question(client)

    return asyncio.run(run())


def test_client_and_app_understand_each_other(store: Path) -> None:
    prediction = ask(store, lambda client: client.predict("toy", Sequence(token_id=1)))
    assert (prediction.model, prediction.version) == ("toy", 2)
    assert prediction.sequences[0].experts.shape == (4, 4)


def test_many_questions_at_once_are_answered_each_with_its_own(store: Path) -> None:
    async def question(client: AsyncClient) -> list[Any]:
        return await asyncio.gather(
            *(client.predict("toy", Sequence(experts=[[0, 1]] * seen)) for seen in [0, 1, 2, 3] * 4)
        )

    depths = [answer.sequences[0].layers[0] for answer in ask(store, question)]
    assert depths == [0, 1, 2, 3] * 4


def test_too_large_a_body_is_refused(store: Path) -> None:
    sequences = [Sequence(experts=[[0, 1]])] * 200
    with pytest.raises(RequestInvalid, match="SPECMOE_MAX_BODY_BYTES") as caught:
        ask(store, lambda client: client.predict("toy", sequences), max_body_bytes=1024)
    assert (caught.value.status, caught.value.code) == (413, "body_too_large")


def test_a_service_that_is_still_loading_gives_no_prediction(store: Path) -> None:
    async def run() -> tuple[Any, Any]:
        async with client_of(Settings(store=str(store), provider="cpu")) as client:
            return await client.predict("toy", Sequence()), client.last_failure

    prediction, failure = asyncio.run(run())
    assert prediction is None
    assert isinstance(failure, ServiceUnavailable)
    assert (failure.status, failure.code) == (503, "not_ready")


def test_a_deadline_ends_a_wait_inside_the_app(store: Path) -> None:
    async def question(client: AsyncClient) -> tuple[Any, Any]:
        return await client.predict("toy", Sequence(), timeout_ms=0.001), client.last_failure

    prediction, failure = ask(store, question)
    assert prediction is None
    assert isinstance(failure, AnswerLate)
