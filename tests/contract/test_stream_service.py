"""The real streams against the real service, in a process of its own, over TCP and over a Unix socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from specmoe_client import (
    NotFound,
    RequestInvalid,
    RequestRefused,
    RoutingShape,
    Stream,
    Token,
)

from model_store.store import open_store
from speculation.demand import union_demand
from speculation.ranking import rank
from speculation.runtime import Speculator
from tests.contract.running import running_service
from tests.contract.streams import until
from tests.toy_version import THRESHOLDS

LAYERS, EXPERTS, TOP_K = 4, 8, 2
PATIENT_MS = 10_000.0
# How long a service that stops waits for its streams.
SOON = "--shutdown-seconds", "1"


class Record:
    """Sequences as they are told, and what the version says of them without any service."""

    def __init__(self, store: Path, seed: int, *, version: int = 2) -> None:
        self._speculator = Speculator(open_store(store).load("toy", version), provider="cpu")
        self._random = np.random.default_rng(seed)

    def token(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(token id, experts [L, K], gates [L, K]), made up."""
        experts = np.array([self._random.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)])
        gates = self._random.random((LAYERS, TOP_K)).astype(np.float32) + np.float32(0.1)
        return int(self._random.integers(0, 50)), experts, gates

    def probabilities(self, past: list[Any], current: Any, seen: int) -> np.ndarray:
        """[L, E] of a token of which `seen` layers are known."""
        state = self._speculator.initial_state(1)
        for token_id, experts, gates in past:
            state = self._speculator.advance(
                state, np.array([token_id]), experts[None].astype(np.int32), gates[None]
            )
        experts, gates = np.full((1, LAYERS, TOP_K), -1, np.int32), np.zeros((1, LAYERS, TOP_K), np.float32)
        experts[0, :seen], gates[0, :seen] = current[1][:seen], current[2][:seen]
        answer: np.ndarray = self._speculator.predict(state, np.array([current[0]]), experts, gates)[0]
        return answer


def assert_forecast(forecast: Any, probabilities: np.ndarray, top_n: int) -> None:
    """The forecast is of these probabilities [L, E]."""
    assert forecast is not None
    experts, ranked = rank(probabilities[forecast.seen :], top_n)
    np.testing.assert_allclose(forecast.probabilities, ranked, atol=1e-5)
    np.testing.assert_array_equal(forecast.experts, experts)


def connected(open_stream: Any, service: dict[str, Any], **options: Any) -> Any:
    stream = open_stream(**service, **options)
    assert stream.ready(), stream.last_failure
    return stream


def test_a_stream_tells_what_it_is_connected_to(open_stream: Any, service: dict[str, Any]) -> None:
    status = connected(open_stream, service).status
    assert (status.state, status.version) == ("connected", 2)
    assert status.spec == RoutingShape(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)


def test_forecasts_are_what_the_version_says_in_process(
    open_stream: Any, service: dict[str, Any], store: Path
) -> None:
    record, stream = Record(store, 1), connected(open_stream, service, top_n=3)
    past = [record.token() for _ in range(3)]
    sequence = stream.open([Token(experts, gates, token_id) for token_id, experts, gates in past[:1]])
    for number, token in enumerate(past[1:]):
        stream.start([sequence], [token[0]])
        for seen in range(LAYERS):
            forecast = stream.wait(sequence, PATIENT_MS)
            assert (forecast.token, forecast.seen) == (number, seen)
            assert_forecast(forecast, record.probabilities(past[: number + 1], token, seen), 3)
            stream.route([sequence], token[1][None, seen], token[2][None, seen])


def test_a_batch_is_its_sequences_and_their_union(
    open_stream: Any, service: dict[str, Any], store: Path
) -> None:
    record, stream = Record(store, 2), connected(open_stream, service, top_n=4, union=True)
    sequences, tokens = [stream.open() for _ in range(5)], [record.token() for _ in range(5)]
    stream.start(sequences, [token[0] for token in tokens])
    for end in (1, 3):
        first = end - (1 if end == 1 else 2)
        stream.route(
            sequences,
            np.stack([token[1][first:end] for token in tokens]),
            np.stack([token[2][first:end] for token in tokens]),
        )
        expected = np.stack([record.probabilities([], token, end) for token in tokens])
        for sequence, probabilities in zip(sequences, expected, strict=True):
            assert_forecast(stream.wait(sequence, PATIENT_MS), probabilities, 4)
        union = stream.wait_union(PATIENT_MS)
        assert set(union.sequences) == set(sequences)
        assert_forecast(union, union_demand(expected), 4)


def test_as_many_layers_and_experts_come_as_were_wanted(open_stream: Any, service: dict[str, Any]) -> None:
    stream = connected(open_stream, service, coverage=0.9, ahead=2, at_start=False, every=2)
    sequence = stream.open()
    stream.start([sequence])
    stream.route([sequence], [[0, 1]])
    assert stream.wait(sequence, PATIENT_MS) is None
    stream.ask([sequence])
    forecast = stream.wait(sequence, PATIENT_MS)
    assert forecast.layers.tolist() == [1, 2]
    probable = (forecast.probabilities >= THRESHOLDS[0]).sum(axis=1)
    assert [len(forecast.experts_of(layer)) for layer in (1, 2)] == np.maximum([3, 4], probable).tolist()
    stream.route([sequence], [[0, 1]])
    assert stream.wait(sequence, PATIENT_MS).layers.tolist() == [2, 3]


@pytest.mark.parametrize(("selector", "version"), [(None, 2), (1, 1), (2, 2), ("production", 2)])
def test_a_version_can_be_chosen(
    open_stream: Any, service: dict[str, Any], store: Path, selector: int | str | None, version: int
) -> None:
    record = Record(store, 3, version=version)
    stream, token = connected(open_stream, service, version=selector, top_n=3), record.token()
    sequence = stream.open()
    stream.start([sequence], [token[0]])
    assert_forecast(stream.wait(sequence, PATIENT_MS), record.probabilities([], token, 0), 3)
    assert stream.status.version == version


REFUSED: dict[str, tuple[dict[str, Any], type[RequestRefused], str]] = {
    "unknown model": ({"model": "toys"}, NotFound, "model_not_found"),
    "unknown version": ({"version": 9}, NotFound, "version_not_found"),
    "unknown alias": ({"version": "best"}, NotFound, "version_not_found"),
    "more experts than there are": ({"top_n": 9}, RequestInvalid, ""),
    "a coverage without a table": ({"coverage": 0.999}, RequestInvalid, ""),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_a_stream_that_is_refused_says_why(
    open_stream: Any, service: dict[str, Any], case: tuple[dict[str, Any], type[RequestRefused], str]
) -> None:
    options, kind, code = case
    stream = open_stream(**service, **options)
    with pytest.raises(kind) as caught:
        stream.ready()
    assert caught.value.remedy
    assert caught.value.code == code or not code
    assert stream.status.state == "refused"


def test_a_path_that_is_not_the_service_is_said(open_stream: Any, service: dict[str, Any]) -> None:
    base_url = service.get("base_url", "http://127.0.0.1")
    with pytest.raises(NotFound) as caught:
        open_stream(**service | {"base_url": f"{base_url}/elsewhere"}).ready()
    assert caught.value.code == "not_found"


def test_a_stream_lives_through_a_restart_of_the_service(store: Path, tmp_path: Path) -> None:
    record, uds = Record(store, 4), str(tmp_path / "s.sock")
    past, token = [record.token() for _ in range(3)], record.token()
    with Stream(uds=uds, model="toy", top_n=3) as stream:
        with running_service(store, "--uds", uds, *SOON):
            assert stream.ready()
            sequence = stream.open()
            for token_id, experts, gates in past[:2]:
                stream.start([sequence], [token_id])
                stream.route([sequence], experts[None], gates[None])
        until(lambda: stream.latest(sequence) is None and stream.status.state == "broken")
        stream.start([sequence], [past[2][0]])
        stream.route([sequence], past[2][1][None], past[2][2][None])
        stream.start([sequence], [token[0]])
        stream.route([sequence], token[1][None, 0], token[2][None, 0])
        assert stream.wait(sequence, PATIENT_MS) is None
        assert stream.last_failure is not None
        with running_service(store, "--uds", uds, *SOON):
            assert stream.ready()
            assert_forecast(stream.wait(sequence, PATIENT_MS), record.probabilities(past, token, 1), 3)


def test_a_service_that_stops_says_so(
    open_stream: Any, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_service(store, *SOON) as reached:
        stream = connected(open_stream, reached)
        sequence = stream.open()
    until(lambda: stream.latest(sequence) is None and stream.status.state == "broken")
    assert "close code 1001" in caplog.text
