"""Small requests of one moment are one model call; each gets its own rows, and its own error.

.venv/bin/python -m pytest tests/service/test_together.py
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.loading import Running
from service.metrics import Metrics
from service.question import Question, answered
from service.schemas import PredictRequest
from service.settings import Settings
from service.together import Together
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


def question(
    running: Running,
    seed: int,
    rows: int = 1,
    *,
    with_gates: bool = True,
    token_id: int = 5,
    combine: str = "per_sequence",
) -> Question:
    _, experts, gates = routed(seed, rows, TOY_SPEC)
    seen = np.minimum((experts[:, :, 0] >= 0).sum(1), TOY_SPEC.num_layers - 1).tolist()
    sequences = [
        {
            "token_id": token_id,
            "experts": its[:count].tolist(),
            "gates": weights[:count].tolist() if with_gates else None,
        }
        for its, weights, count in zip(experts, gates, seen, strict=True)
    ]
    request = {"model": "toy", "sequences": sequences, "top_n": 1 + seed % 3, "combine": combine}
    return Question(PredictRequest.model_validate(request), running)


def wrong(running: Running) -> Question:
    wrong = question(running, 9)
    wrong.batch = replace(wrong.batch, experts=np.full_like(wrong.batch.experts, TOY_SPEC.num_experts))
    return wrong


def assert_as_if_alone(answer: bytes, asked: Question) -> None:
    """The answer is the one that the question gets by itself, up to how a model call rounds."""
    state = SPECULATOR.initial_state(len(asked.batch.current))
    probabilities = SPECULATOR.predict(state, asked.batch.token_ids, asked.batch.experts, asked.batch.gates)
    (alone,) = answered([asked], probabilities)
    assert flat(json.loads(answer)) == pytest.approx(flat(json.loads(alone)), abs=2e-6)


def flat(document: Any) -> dict[str, Any]:
    """Every number and text of a JSON document, by its path."""
    if not isinstance(document, dict | list):
        return {"": document}
    parts = document.items() if isinstance(document, dict) else enumerate(document)
    return {f"/{key}{path}": value for key, part in parts for path, value in flat(part).items()}


async def test_requests_of_one_moment_share_a_call_and_get_their_own_answers(
    running: Running, speculator: Counting
) -> None:
    together = Together()
    asked = [
        question(
            running,
            seed,
            1 + seed % 3,
            with_gates=seed % 2 == 0,
            combine="union" if seed == 3 else "per_sequence",
        )
        for seed in range(6)
    ]
    answers = await asyncio.gather(*map(together.answer, asked))
    assert speculator.calls == [sum(len(one.batch.current) for one in asked)]
    for answer, one in zip(answers, asked, strict=True):
        assert_as_if_alone(answer, one)


async def test_requests_of_different_moments_do_not_wait_for_each_other(
    running: Running, speculator: Counting
) -> None:
    together = Together()
    for seed in range(3):
        await together.answer(question(running, seed))
    assert speculator.calls == [1, 1, 1]


async def test_versions_are_not_mixed(running: Running, speculator: Counting) -> None:
    together, other = Together(), replace(running, version=2)
    answers = await asyncio.gather(*(together.answer(question(one, 1)) for one in (running, other, running)))
    assert speculator.calls == [2, 1]
    assert [json.loads(answer)["version"] for answer in answers] == [1, 2, 1]


async def test_a_wrong_one_fails_alone(running: Running) -> None:
    together, good = Together(), [question(running, 1), question(running, 2)]
    asked = (together.answer(one) for one in (good[0], wrong(running), good[1]))
    first, error, second = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(error, InputInvalid)
    for answer, one in zip((first, second), good, strict=True):
        assert isinstance(answer, bytes)
        assert_as_if_alone(answer, one)


@pytest.mark.filterwarnings("error")
async def test_one_whose_client_has_gone_hurts_nobody(running: Running) -> None:
    together, last = Together(), question(running, 2)
    gone = [asyncio.ensure_future(together.answer(one)) for one in (question(running, 1), wrong(running))]
    stays = asyncio.ensure_future(together.answer(last))
    asyncio.get_running_loop().call_soon(lambda: [task.cancel() for task in gone])
    assert_as_if_alone(await stays, last)
    assert all(
        isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*gone, return_exceptions=True)
    )


async def test_a_model_that_fails_is_told_to_all_who_wait_and_to_no_others(running: Running) -> None:
    together, other = Together(), replace(running, version=2)
    asked = [question(running, 1), question(running, 2, token_id=666), question(other, 3)]
    answers = await asyncio.gather(*map(together.answer, asked), return_exceptions=True)
    assert [str(answer) for answer in answers[:2]] == ["no memory"] * 2
    assert isinstance(answers[2], bytes)
    assert_as_if_alone(answers[2], asked[2])


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
