"""Small requests of one moment are one model call; each gets its own rows, and its own error.

.venv/bin/python -m pytest tests/service/test_together.py
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.batch import Batch
from service.loading import Running
from service.metrics import Metrics
from service.settings import Settings
from service.together import Together, joined
from speculation.errors import InputInvalid
from speculation.runtime import Speculator
from tests.service.in_process import body, running_app
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC, toy_stored

pytestmark = pytest.mark.anyio

SPECULATOR = Speculator(toy_stored(), provider="cpu")


class Counting:
    """A Speculator that notes how many rows each call had."""

    def __init__(self) -> None:
        self.spec, self.initial_state = SPECULATOR.spec, SPECULATOR.initial_state
        self.calls: list[int] = []

    def predict(self, state: Any, token_ids: Any, experts: np.ndarray[Any, Any], gates: Any) -> Any:
        self.calls.append(len(experts))
        if 666 in token_ids:
            raise RuntimeError("no memory")
        return SPECULATOR.predict(state, token_ids, experts, gates)


@pytest.fixture
def speculator() -> Counting:
    return Counting()


@pytest.fixture
def running(speculator: Counting) -> Running:
    metrics = Metrics().of_version("toy", 1)
    return Running("toy", 1, speculator, "", 0.0, metrics)  # type: ignore[arg-type]


def batch(seed: int, rows: int = 1, *, with_gates: bool = True, token_id: int = 5) -> Batch:
    _, experts, gates = routed(seed, rows, TOY_SPEC)
    return Batch(
        token_ids=np.full(rows, token_id),
        experts=experts,
        gates=gates if with_gates else None,
        current=np.arange(rows),
        context_tokens=np.zeros(rows, np.int64),
        seen=(experts[:, :, 0] >= 0).sum(1),
    )


def alone(batch: Batch) -> np.ndarray[Any, Any]:
    state = SPECULATOR.initial_state(len(batch.current))
    return SPECULATOR.predict(state, batch.token_ids, batch.experts, batch.gates)


def wrong() -> Batch:
    good = batch(9)
    return replace(good, experts=np.full_like(good.experts, TOY_SPEC.num_experts))


async def test_requests_of_one_moment_share_a_call_and_get_their_own_rows(
    running: Running, speculator: Counting
) -> None:
    together = Together()
    batches = [batch(seed, 1 + seed % 3, with_gates=seed % 2 == 0) for seed in range(6)]
    answers = await asyncio.gather(*(together.predict(running, one) for one in batches))
    assert speculator.calls == [sum(len(one.current) for one in batches)]
    for answer, one in zip(answers, batches, strict=True):
        np.testing.assert_allclose(answer, alone(one), atol=1e-6)


async def test_requests_of_different_moments_do_not_wait_for_each_other(
    running: Running, speculator: Counting
) -> None:
    together = Together()
    for seed in range(3):
        await together.predict(running, batch(seed))
    assert speculator.calls == [1, 1, 1]


async def test_versions_are_not_mixed(running: Running, speculator: Counting) -> None:
    together, other = Together(), replace(running, version=2)
    await asyncio.gather(*(together.predict(one, batch(1)) for one in (running, other, running)))
    assert speculator.calls == [2, 1]


async def test_a_wrong_one_fails_alone(running: Running) -> None:
    together, good = Together(), [batch(1), batch(2)]
    asked = (together.predict(running, one) for one in (good[0], wrong(), good[1]))
    first, error, second = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(error, InputInvalid)
    np.testing.assert_allclose(np.concatenate([first, second]), alone(joined(good)), atol=1e-6)


@pytest.mark.filterwarnings("error")
async def test_one_whose_client_has_gone_hurts_nobody(running: Running) -> None:
    together = Together()
    gone = [asyncio.ensure_future(together.predict(running, one)) for one in (batch(1), wrong())]
    stays = asyncio.ensure_future(together.predict(running, batch(2)))
    asyncio.get_running_loop().call_soon(lambda: [task.cancel() for task in gone])
    np.testing.assert_allclose(await stays, alone(batch(2)), atol=1e-6)
    assert all(
        isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*gone, return_exceptions=True)
    )


async def test_a_model_that_fails_is_told_to_all_who_wait_and_to_no_others(running: Running) -> None:
    together, other = Together(), replace(running, version=2)
    asked = [(running, batch(1)), (running, batch(2, token_id=666)), (other, batch(3))]
    answers = await asyncio.gather(
        *(together.predict(version, one) for version, one in asked), return_exceptions=True
    )
    assert [str(answer) for answer in answers[:2]] == ["no memory"] * 2
    np.testing.assert_allclose(answers[2], alone(batch(3)), atol=1e-6)


async def test_requests_over_http_share_calls(shared_store: Path) -> None:
    async with running_app(Settings(store=str(shared_store), provider="cpu")) as client:
        requests = [{"token_id": 5}, {"token_id": 6}, {"experts": [[0, 8]]}, {"token_id": 7}]
        answers = await asyncio.gather(
            *(client.post("/v1/predict", json=body(request)) for request in requests)
        )
        alone = [await client.post("/v1/predict", json=body(request)) for request in requests]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200]
    for together, single in zip(answers, alone, strict=True):
        assert together.json().get("predictions") == single.json().get("predictions")
