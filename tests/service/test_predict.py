"""What /v1/predict answers, against the Speculator called step by step.

.venv/bin/python -m pytest tests/service/test_predict.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from speculation.runtime import Speculator, load_speculator
from tests.service.in_process import FINISHED, predict
from tests.toy_version import TOY_SPEC

pytestmark = pytest.mark.anyio

LAYERS, EXPERTS, TOP_K = TOY_SPEC.num_layers, TOY_SPEC.num_experts, TOY_SPEC.top_k
GATES = [[0.7, 0.3], [3.0, 1.0], [0.5, 0.5], [0.0, 2.0]]
START: dict[str, Any] = {"token_id": 5}
MIDDLE: dict[str, Any] = {
    "token_id": 9,
    "experts": FINISHED[:2],
    "gates": GATES[:2],
    "context": [
        {"token_id": 4, "experts": FINISHED, "gates": GATES},
        {"experts": FINISHED[::-1]},
        {"token_id": 0, "experts": FINISHED, "gates": GATES[::-1]},
    ],
}
DEEP: dict[str, Any] = {"experts": FINISHED[:3], "context": [{"token_id": 7, "experts": FINISHED}]}
SEQUENCES = [START, MIDDLE, DEEP]


@pytest.fixture(scope="module")
def speculator(shared_store: Path) -> Speculator:
    return load_speculator("toy", store=shared_store, provider="cpu")


def arrays(token: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One token as the Speculator takes it."""
    token_id = token.get("token_id")
    experts = np.full((1, LAYERS, TOP_K), -1, np.int32)
    gates = np.ones((1, LAYERS, TOP_K), np.float32)
    for layer, slots in enumerate(token.get("experts", [])):
        experts[0, layer] = slots
        gates[0, layer] = token["gates"][layer] if token.get("gates") else 1.0
    return np.array([-1 if token_id is None else token_id]), experts, gates


def reference(speculator: Speculator, sequence: dict[str, Any]) -> np.ndarray:
    """Probabilities [L, E] of one sequence alone, its context advanced token by token."""
    state = speculator.initial_state(1)
    for token in sequence.get("context", []):
        state = speculator.advance(state, *arrays(token))
    return speculator.predict(state, *arrays(sequence))[0]


def best(row: np.ndarray, n: int) -> list[int]:
    return sorted(range(EXPERTS), key=lambda expert: (-row[expert], expert))[:n]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=["start", "middle", "deep"])
async def test_each_unseen_layer_gets_its_likeliest_experts(
    client: httpx.AsyncClient, speculator: Speculator, sequence: dict[str, Any]
) -> None:
    expected, seen = reference(speculator, sequence), len(sequence.get("experts", []))
    (layers,) = (await predict(client, sequence, top_n=3))["predictions"]
    assert [entry["layer"] for entry in layers] == list(range(seen, LAYERS))
    for entry in layers:
        row = expected[entry["layer"]]
        assert entry["experts"] == best(row, 3)
        assert entry["probabilities"] == pytest.approx(row[entry["experts"]], abs=1e-6)


async def test_a_batch_of_sequences_at_different_depths_equals_its_sequences_alone(
    client: httpx.AsyncClient,
) -> None:
    together = (await predict(client, *SEQUENCES))["predictions"]
    assert together == [(await predict(client, sequence))["predictions"][0] for sequence in SEQUENCES]


@pytest.mark.parametrize("copies", [1, 12], ids=["inline", "on a thread"])
async def test_large_and_small_requests_are_answered_alike(client: httpx.AsyncClient, copies: int) -> None:
    answers = (await predict(client, *[MIDDLE] * copies))["predictions"]
    assert answers == (await predict(client, MIDDLE))["predictions"] * copies


async def test_a_body_too_long_to_parse_inline_is_answered_alike(client: httpx.AsyncClient) -> None:
    long = {"context": [{"experts": FINISHED}] * 600}
    assert (await predict(client, long, long))["predictions"][0] == (await predict(client, long))[
        "predictions"
    ][0]


async def test_distance_counts_from_the_last_layer_seen(client: httpx.AsyncClient) -> None:
    start, middle = (await predict(client, START, MIDDLE))["predictions"]
    assert [entry["distance"] for entry in start] == [1, 2, 3, 4]
    assert [entry["distance"] for entry in middle] == [1, 2]


async def test_expected_recall_is_the_listed_probability_over_top_k(client: httpx.AsyncClient) -> None:
    (layers,) = (await predict(client, START, top_n=1))["predictions"]
    assert [entry["expected_recall"] for entry in layers] == pytest.approx(
        [entry["probabilities"][0] / TOP_K for entry in layers], abs=1e-6
    )


async def test_twice_the_routed_experts_are_listed_where_nothing_else_is_asked(
    client: httpx.AsyncClient,
) -> None:
    (layers,) = (await predict(client, START))["predictions"]
    assert {len(entry["experts"]) for entry in layers} == {2 * TOP_K}


async def test_coverage_lists_the_first_ranked_and_all_that_are_probable(
    client: httpx.AsyncClient, speculator: Speculator
) -> None:
    answers = (await predict(client, START, MIDDLE, coverage=0.93))["predictions"]
    for sequence, layers in zip((START, MIDDLE), answers, strict=True):
        seen = len(sequence.get("experts", []))
        sizes = speculator.coverage_sets(0.93).sizes(reference(speculator, sequence), seen)
        assert sizes.any()
        for entry in layers:
            size = sizes[entry["layer"]]
            assert len(entry["experts"]) == len(entry["probabilities"]) == size
            shortened = min(1.0, sum(entry["probabilities"]) / TOP_K)
            assert entry["expected_recall"] == pytest.approx(shortened, abs=1e-5)


async def test_only_wanted_layers_that_a_sequence_has_not_seen_are_told(client: httpx.AsyncClient) -> None:
    answers = (await predict(client, START, MIDDLE, DEEP, layers=[3, 1, 3]))["predictions"]
    assert [[entry["layer"] for entry in layers] for layers in answers] == [[1, 3], [3], [3]]


async def test_union_is_the_probability_that_a_sequence_still_needs_the_expert(
    client: httpx.AsyncClient, speculator: Speculator
) -> None:
    answer = await predict(client, *SEQUENCES, combine="union", top_n=EXPERTS)
    assert answer["predictions"] is None
    none_needs = np.ones((LAYERS, EXPERTS))
    for sequence in SEQUENCES:
        seen = len(sequence.get("experts", []))
        none_needs[seen:] *= 1 - reference(speculator, sequence)[seen:]
    for entry in answer["union"]:
        expected = 1 - none_needs[entry["layer"]]
        assert entry["probabilities"] == pytest.approx(expected[entry["experts"]], abs=1e-5)
        assert entry["probabilities"] == sorted(entry["probabilities"], reverse=True)


async def test_union_with_coverage_holds_every_sequences_set_and_nothing_else(
    client: httpx.AsyncClient,
) -> None:
    alone = (await predict(client, *SEQUENCES, coverage=0.9))["predictions"]
    together = (await predict(client, *SEQUENCES, coverage=0.9, combine="union"))["union"]
    for entry in together:
        sets = [
            set(other["experts"]) for layers in alone for other in layers if other["layer"] == entry["layer"]
        ]
        assert set(entry["experts"]) == set().union(*sets)


@pytest.mark.parametrize(("selector", "version"), [(None, 2), (1, 1), (2, 2), ("production", 2)])
async def test_the_answer_names_the_version_that_gave_it(
    client: httpx.AsyncClient, selector: int | str | None, version: int
) -> None:
    assert (await predict(client, version=selector))["version"] == version


async def test_concurrent_requests_for_different_versions_each_get_theirs(client: httpx.AsyncClient) -> None:
    selectors = [1, 2, None, 1, "production", 1, 2]
    alone = [await predict(client, MIDDLE, version=selector) for selector in selectors]
    together = await asyncio.gather(*[predict(client, MIDDLE, version=selector) for selector in selectors])
    assert together == alone
    assert [answer["version"] for answer in together] == [1, 2, 2, 1, 2, 1, 2]
    assert alone[0]["predictions"] != alone[1]["predictions"]


async def test_no_prediction_changes_with_the_gates_scale(client: httpx.AsyncClient) -> None:
    scaled = MIDDLE | {"gates": [[weight * 8 for weight in slots] for slots in MIDDLE["gates"]]}
    assert (await predict(client, scaled))["predictions"] == (await predict(client, MIDDLE))["predictions"]
