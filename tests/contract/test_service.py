"""The real clients against the real service, in a process of its own, over TCP and over a Unix socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from specmoe_client import (
    AnswerLate,
    Client,
    NotFound,
    RequestInvalid,
    RequestRefused,
    RoutingShape,
    Sequence,
    ServiceUnreachable,
    Token,
)

from model_store.store import open_store
from speculation.ranking import rank
from speculation.runtime import Speculator
from tests.contract.running import running_service
from tests.toy_version import THRESHOLDS

FINISHED = Token(
    experts=np.array([[1, 2], [3, 4], [5, 6], [7, 0]]), gates=np.full((4, 2), 0.5, np.float32), token_id=11
)
SO_FAR = Sequence(experts=np.array([[3, 1]]), gates=np.array([[0.7, 0.3]]), token_id=12, context=[FINISHED])


def in_process(store: Path, version: int) -> np.ndarray:
    """The probabilities for SO_FAR without any service: [L, E]."""
    speculator = Speculator(open_store(store).load("toy", version), provider="cpu")
    state = speculator.initial_state(1)
    state = speculator.advance(
        state,
        np.array([FINISHED.token_id]),
        np.asarray(FINISHED.experts, np.int32)[None],
        np.asarray(FINISHED.gates, np.float32)[None],
    )
    experts, gates = np.full((1, 4, 2), -1, np.int32), np.zeros((1, 4, 2), np.float32)
    experts[0, 0], gates[0, 0] = np.asarray(SO_FAR.experts)[0], np.asarray(SO_FAR.gates)[0]
    probabilities: np.ndarray = speculator.predict(state, np.array([SO_FAR.token_id]), experts, gates)[0]
    return probabilities


def test_the_service_is_ready_and_tells_what_it_serves(connect: Any, service: dict[str, Any]) -> None:
    client = connect(**service)
    assert client.ready()
    (info,) = client.models()
    assert (info.model, info.ready, info.version, info.versions) == ("toy", True, 2, (1, 2))
    assert info.shape == RoutingShape(num_layers=4, num_experts=8, top_k=2)
    assert info.aliases == {"production": 2}


@pytest.mark.parametrize(("selector", "version"), [(None, 2), (1, 1), (2, 2), ("production", 2)])
def test_a_prediction_is_what_the_version_says_in_process(
    connect: Any, service: dict[str, Any], store: Path, selector: int | str | None, version: int
) -> None:
    prediction = connect(**service).predict("toy", SO_FAR, version=selector, top_n=3)
    (answer,) = prediction.sequences
    experts, probabilities = rank(in_process(store, version)[1:], 3)
    assert prediction.version == version
    np.testing.assert_array_equal(answer.experts, experts)
    np.testing.assert_allclose(answer.probabilities, probabilities, atol=1e-5)
    np.testing.assert_array_equal(answer.layers, [1, 2, 3])
    np.testing.assert_array_equal(answer.distances, [1, 2, 3])


def test_a_batch_is_its_sequences(connect: Any, service: dict[str, Any]) -> None:
    client, start = connect(**service), Sequence(token_id=5)
    together = client.predict("toy", [SO_FAR, start]).sequences
    for answer, sequence in zip(together, [SO_FAR, start], strict=True):
        (alone,) = client.predict("toy", sequence).sequences
        np.testing.assert_array_equal(answer.experts, alone.experts)
        np.testing.assert_allclose(answer.probabilities, alone.probabilities, atol=1e-5)


def test_an_unknown_token_may_be_given_as_minus_one(connect: Any, service: dict[str, Any]) -> None:
    client = connect(**service)
    unknown, minus_one = (client.predict("toy", Sequence(token_id=token)) for token in (None, -1))
    np.testing.assert_array_equal(unknown.sequences[0].experts, minus_one.sequences[0].experts)


def test_only_the_layers_wanted_come(connect: Any, service: dict[str, Any]) -> None:
    deep = Sequence(experts=np.array([[0, 1], [0, 1], [0, 1]]))
    answers = connect(**service).predict("toy", [SO_FAR, deep], layers=np.array([1, 2])).sequences
    assert [answer.layers.tolist() for answer in answers] == [[1, 2], []]


def test_a_coverage_set_has_as_many_experts_as_the_layer_needs(connect: Any, service: dict[str, Any]) -> None:
    client = connect(**service)
    (answer,) = client.predict("toy", Sequence(), coverage=0.9).sequences
    (whole,) = client.predict("toy", Sequence(), top_n=8).sequences
    probable = (whole.probabilities >= THRESHOLDS[0]).sum(axis=1)
    needed = np.maximum([3, 4, 5, 6], probable)
    assert (
        len(set((needed - [3, 4, 5, 6]).tolist())) > 1
    )  # some for being first-ranked, some for being probable
    assert [len(answer.experts_of(layer)) for layer in range(5)] == [*needed, 0]
    assert (answer.probabilities[answer.experts == -1] == 0).all()


def test_the_union_has_one_ranking_for_all(connect: Any, service: dict[str, Any]) -> None:
    client = connect(**service)
    start = Sequence(token_id=5)
    union = client.predict_union("toy", [start, start], top_n=8).union
    alone = client.predict("toy", start, top_n=8).sequences[0]
    by_expert = np.argsort(alone.experts, axis=1)
    once = np.take_along_axis(alone.probabilities, by_expert, axis=1)
    twice = np.take_along_axis(union.probabilities, np.argsort(union.experts, axis=1), axis=1)
    np.testing.assert_allclose(twice, 1 - (1 - once) ** 2, atol=1e-5)


WRONG: dict[str, tuple[str, Any, dict[str, Any], type[RequestRefused], str]] = {
    "unknown model": ("toys", Sequence(), {}, NotFound, "model_not_found"),
    "unknown version": ("toy", Sequence(), {"version": 9}, NotFound, "version_not_found"),
    "unknown alias": ("toy", Sequence(), {"version": "best"}, NotFound, "version_not_found"),
    "too few experts": ("toy", Sequence(experts=[[1]]), {}, RequestInvalid, "invalid_request"),
    "a flat list of experts": ("toy", Sequence(experts=[1, 2]), {}, RequestInvalid, "invalid_request"),
    "expert out of range": ("toy", Sequence(experts=[[1, 8]]), {}, RequestInvalid, "invalid_request"),
    "expert twice": ("toy", Sequence(experts=[[1, 1]]), {}, RequestInvalid, "invalid_request"),
    "fractional experts": ("toy", Sequence(experts=[[1.0, 2.0]]), {}, RequestInvalid, "invalid_request"),
    "all layers seen": (
        "toy",
        Sequence(experts=FINISHED.experts),
        {},
        RequestInvalid,
        "invalid_request",
    ),
    "gates of another shape": (
        "toy",
        Sequence(experts=[[1, 2]], gates=[[0.5]]),
        {},
        RequestInvalid,
        "invalid_request",
    ),
    "gates that are no numbers": (
        "toy",
        Sequence(experts=[[1, 2]], gates=[[0.5, np.nan]]),
        {},
        RequestInvalid,
        "invalid_request",
    ),
    "unfinished context": (
        "toy",
        Sequence(context=[Token(experts=[[1, 2]])]),
        {},
        RequestInvalid,
        "invalid_request",
    ),
    "no sequence": ("toy", [], {}, RequestInvalid, "invalid_request"),
    "misspelt option": ("toy", Sequence(), {"topn": 3}, RequestInvalid, "invalid_request"),
    "two sizes": ("toy", Sequence(), {"top_n": 3, "coverage": 0.9}, RequestInvalid, "invalid_request"),
    "too many sequences": ("toy", [Sequence()] * 257, {}, RequestInvalid, "batch_too_large"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_question_is_raised_even_where_failures_are_not(
    connect: Any, service: dict[str, Any], case: tuple[str, Any, dict[str, Any], type[RequestRefused], str]
) -> None:
    model, sequences, options, kind, code = case
    with pytest.raises(kind) as caught:
        connect(**service).predict(model, sequences, on_failure="none", **options)
    assert caught.value.code == code
    assert caught.value.remedy
    assert caught.value.request_id


def test_an_impossible_deadline_makes_no_prediction_and_harms_no_later_one(
    connect: Any, service: dict[str, Any]
) -> None:
    client = connect(**service)
    assert client.predict("toy", SO_FAR, timeout_ms=0.001) is None
    assert isinstance(client.last_failure, AnswerLate)
    assert client.predict("toy", SO_FAR) is not None


def test_a_path_that_is_not_the_service_is_said(connect: Any, service: dict[str, Any]) -> None:
    base_url = service.get("base_url", "http://127.0.0.1")
    with pytest.raises(NotFound) as caught:
        connect(**service | {"base_url": f"{base_url}/elsewhere"}).models()
    assert caught.value.code == "not_found"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the transport's socket that could not connect
def test_decoding_goes_on_while_the_service_restarts(store: Path, tmp_path: Path) -> None:
    uds = str(tmp_path / "s.sock")
    with Client(uds=uds, timeout_ms=10_000) as client:
        with running_service(store, "--uds", uds):
            before = client.predict("toy", SO_FAR)
        assert client.predict("toy", SO_FAR) is None
        assert isinstance(client.last_failure, ServiceUnreachable)
        with running_service(store, "--uds", uds):
            after = client.predict("toy", SO_FAR)
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(before.sequences[0].experts, after.sequences[0].experts)
