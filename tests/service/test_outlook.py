"""An outlook over REST: what the Speculator tells, only where it is asked for, refused where there is none.

.venv/bin/python -m pytest tests/service/test_outlook.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model_store.store import open_store
from service.settings import Settings
from speculation.runtime import Speculator, load_speculator
from tests.service.in_process import FINISHED, body, predict, running_app
from tests.toy_version import toy_version

pytestmark = pytest.mark.anyio

SEQUENCES: list[dict[str, Any]] = [{}, {"token_id": 3, "context": [{"token_id": 4, "experts": FINISHED}]}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outlook") / "store"
    open_store(root).publish(*toy_version(outlook=True))
    return root


@pytest.fixture
async def far_seeing(store: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with running_app(Settings(store=str(store), provider="cpu")) as client:
        yield client


def expected(store: Path) -> np.ndarray:
    speculator: Speculator = load_speculator("toy", store=store, provider="cpu")
    state = speculator.initial_state(2)
    experts = np.array(FINISHED, np.int32)[None]
    after = speculator.advance(speculator.initial_state(1), np.array([4]), experts, None)
    state = tuple(np.concatenate([before[:1], later]) for before, later in zip(state, after, strict=True))
    return speculator.outlook(state)


async def test_each_sequence_gets_what_the_speculator_tells(
    far_seeing: httpx.AsyncClient, store: Path
) -> None:
    plain = await predict(far_seeing, *SEQUENCES)
    answer = await predict(far_seeing, *SEQUENCES, outlook=True)
    assert "outlook" not in plain
    assert answer["predictions"] == plain["predictions"]
    assert answer["outlook"]["tokens"] == 3
    np.testing.assert_allclose(answer["outlook"]["uses"], expected(store), atol=1e-4)


async def test_the_union_is_of_a_use_by_any_sequence(far_seeing: httpx.AsyncClient, store: Path) -> None:
    answer = await predict(far_seeing, *SEQUENCES, outlook=True, combine="union")
    any_use = 1 - (1 - expected(store)).prod(axis=0)
    np.testing.assert_allclose(answer["outlook"]["uses"], any_use[None], atol=1e-4)


async def test_without_context_it_is_that_of_a_beginning(far_seeing: httpx.AsyncClient) -> None:
    answer = await predict(far_seeing, {}, outlook=True)
    assert np.unique(answer["outlook"]["uses"]) == 0.5


async def test_a_version_without_one_refuses(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/predict", json=body(outlook=True))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "no outlook.onnx" in answer.json()["message"]
