"""Whatever is posted is answered, never with a fault of the service.

.venv/bin/python -m pytest tests/service/test_fuzz.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.settings import Settings
from tests.service.in_process import FINISHED, app_on_a_thread

Post = Callable[[bytes], httpx.Response]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def perhaps(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what belongs there, sometimes anything."""
    return st.integers(0, 9).flatmap(lambda die: anything if die == 0 else strategy)


def rows(slot: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return perhaps(st.lists(perhaps(st.lists(slot, min_size=1, max_size=3)), max_size=5))


finished = st.just({"experts": FINISHED})
token = st.fixed_dictionaries(
    {},
    optional={
        "token_id": perhaps(st.integers(-1, 2**31)),
        "experts": rows(st.integers(-1, 8)) | st.integers(0, 4).map(lambda seen: FINISHED[:seen]),
        "gates": rows(st.floats() | st.integers(-1, 3))
        | st.integers(0, 4).map(lambda seen: [[0.5, 1]] * seen),
    },
)
sequence = st.tuples(token, st.lists(finished | token, max_size=3)).map(
    lambda pair: {**pair[0], "context": pair[1]}
)
request = st.fixed_dictionaries(
    {"model": perhaps(st.just("toy")), "sequences": perhaps(st.lists(sequence, max_size=6))},
    optional={
        "version": perhaps(st.none() | st.integers(-1, 4) | st.sampled_from(["production", "candidate"])),
        "layers": perhaps(st.none() | st.lists(st.integers(-1, 4), max_size=4)),
        "top_n": perhaps(st.none() | st.integers(-1, 9)),
        "coverage": perhaps(st.none() | st.floats(0, 1)),
        "combine": perhaps(st.sampled_from(["per_sequence", "union"])),
        "else": anything,
    },
)


@pytest.fixture(scope="module")
def post(shared_store: Path) -> Iterator[Post]:
    """Posts a body to one app."""
    with app_on_a_thread(Settings(store=str(shared_store), provider="cpu")) as post:
        yield lambda body: post("/v1/predict", body, {"content-type": "application/json"})


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 404, 413, 422), response.text
    if response.status_code != 200:
        assert set(response.json()) == {"code", "message", "remedy", "request_id"}


@settings(max_examples=200, deadline=None)
@given(request)
def test_requests_that_are_nearly_right(post: Post, request: Any) -> None:
    check(post(json.dumps(request).encode()))


@settings(max_examples=50, deadline=None)
@given(anything)
def test_json_of_any_kind(post: Post, value: Any) -> None:
    check(post(json.dumps(value).encode()))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=100))
def test_bytes_of_any_kind(post: Post, body: bytes) -> None:
    assert post(body).status_code == 422
