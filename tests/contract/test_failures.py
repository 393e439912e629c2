"""The real clients against servers that are late, dead, restarting, or talk nonsense: over real sockets."""

from __future__ import annotations

import gc
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from specmoe_client import (
    AnswerInvalid,
    AnswerLate,
    ClientError,
    NoPrediction,
    NotFound,
    RequestInvalid,
    RequestRefused,
    Sequence,
    ServiceUnavailable,
    ServiceUnreachable,
)

from tests.contract.odd_server import (
    Behaviour,
    OddServer,
    answer,
    cut_off,
    hang_up,
    no_http,
    refusal,
    silent,
    trickle,
)

GOOD = {
    "model": "toy",
    "version": 2,
    "predictions": [
        [{"layer": 1, "distance": 2, "experts": [3, 0], "probabilities": [0.9, 0.1], "expected_recall": 0.5}]
    ],
    "union": None,
}
START = Sequence(token_id=7)
good = answer(json.dumps(GOOD).encode())


def changed(**fields: Any) -> Behaviour:
    """The good answer with some fields replaced."""
    return answer(json.dumps(GOOD | fields).encode())


def with_row(**fields: Any) -> Behaviour:
    """The good answer with some fields of its only row replaced."""
    return changed(predictions=[[GOOD["predictions"][0][0] | fields]])  # type: ignore[index]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.parametrize("behaviour", [silent, trickle], ids=["silent", "trickling"])
def test_a_late_answer_is_no_prediction(connect: Any, behaviour: Behaviour) -> None:
    with OddServer([behaviour]) as server:
        client = connect(server.url, timeout_ms=50)
        assert client.predict("toy", START) is None
        assert isinstance(client.last_failure, AnswerLate)


def test_the_next_prediction_comes_after_a_late_one(connect: Any) -> None:
    with OddServer([silent, good]) as server:
        client = connect(server.url)
        assert client.predict("toy", START, timeout_ms=50) is None
        assert client.predict("toy", START) is not None
        assert client.last_failure is None


def test_the_deadline_of_one_call_overrides_that_of_the_client(connect: Any) -> None:
    with OddServer([silent]) as server, pytest.raises(AnswerLate, match="within 40 ms"):
        connect(server.url).predict("toy", START, timeout_ms=40, on_failure="raise")


def test_a_dead_service_is_no_prediction(connect: Any) -> None:
    client = connect(f"http://127.0.0.1:{closed_port()}", retries=2)
    assert client.predict("toy", START) is None
    assert isinstance(client.last_failure, ServiceUnreachable)
    assert not client.ready()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_socket_file_that_is_not_there_is_no_prediction(connect: Any, tmp_path: Path) -> None:
    client = connect(uds=str(tmp_path / "none.sock"))
    assert client.predict("toy", START) is None
    assert client.last_failure.reason == "unreachable"
    # The transport leaves the socket that could not connect to the garbage collector, which warns: here, now.
    gc.collect()


def test_a_failure_that_is_kept_keeps_nothing_else_alive(connect: Any) -> None:
    with OddServer([hang_up]) as server:
        client = connect(server.url)
        client.predict("toy", START)
    failure = client.last_failure
    assert failure.__traceback__ is failure.__cause__ is failure.__context__ is None


def test_a_service_that_restarts_is_found_again(connect: Any) -> None:
    with OddServer([good]) as server:
        client = connect(server.url)
        assert client.predict("toy", START) is not None
    assert client.predict("toy", START) is None
    with OddServer([good], port=server.port):
        assert client.predict("toy", START) is not None


def test_a_service_that_restarts_on_a_unix_socket_is_found_again(connect: Any, tmp_path: Path) -> None:
    uds = str(tmp_path / "s.sock")
    client = connect(uds=uds)
    for _ in range(2):
        with OddServer([good], uds=uds):
            assert client.predict("toy", START) is not None
        Path(uds).unlink(missing_ok=True)


def test_questions_share_a_connection(connect: Any) -> None:
    with OddServer([good]) as server:
        client = connect(server.url)
        for _ in range(3):
            assert client.predict("toy", START) is not None
        assert (server.requests, server.connections) == (3, 1)


@pytest.mark.parametrize(
    "behaviour", [hang_up, cut_off, no_http], ids=["hangs up", "breaks off in the body", "is no HTTP"]
)
def test_a_broken_conversation_is_no_prediction_and_is_not_repeated(
    connect: Any, behaviour: Behaviour
) -> None:
    with OddServer([behaviour]) as server:
        client = connect(server.url, retries=3)
        assert client.predict("toy", START) is None
        assert isinstance(client.last_failure, ServiceUnreachable)
        assert server.requests == 1


@pytest.mark.parametrize(("retries", "requests"), [(0, 1), (1, 2), (5, 3)])
def test_a_service_that_is_not_ready_is_asked_again_as_often_as_allowed(
    connect: Any, retries: int, requests: int
) -> None:
    with OddServer([refusal(503, "not_ready"), refusal(503, "not_ready"), good]) as server:
        prediction = connect(server.url, retries=retries).predict("toy", START)
        assert server.requests == requests
        assert (prediction is not None) == (requests == 3)


def test_retries_end_with_the_deadline(connect: Any) -> None:
    with OddServer([refusal(503, "not_ready")]) as server:
        client = connect(server.url, retries=1_000_000, timeout_ms=60)
        assert client.predict("toy", START) is None
        assert 1 <= server.requests < 60


@pytest.mark.parametrize("status", [408, 429, 500, 502])
def test_a_service_that_fails_or_is_too_busy_is_not_asked_again(connect: Any, status: int) -> None:
    with OddServer([refusal(status, "some_code")]) as server:
        client = connect(server.url, retries=3)
        assert client.predict("toy", START) is None
        failure = client.last_failure
        assert isinstance(failure, ServiceUnavailable)
        assert (failure.status, failure.code, failure.request_id) == (status, "some_code", "r1")
        assert server.requests == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, NotFound), (413, RequestInvalid), (422, RequestInvalid), (415, RequestRefused)],
)
def test_a_wrong_question_is_raised_with_the_words_of_the_service(
    connect: Any, status: int, kind: type[RequestRefused]
) -> None:
    with OddServer([refusal(status, "some_code")]) as server:
        with pytest.raises(kind, match=r"^It is so\. Do this\.$") as caught:
            connect(server.url, retries=3).predict("toy", START)
        error = caught.value
        assert (error.status, error.code, error.remedy, error.request_id) == (
            status,
            "some_code",
            "Do this.",
            "r1",
        )
        assert server.requests == 1


def test_a_refusal_without_the_words_of_the_service_still_says_what_happened(connect: Any) -> None:
    with OddServer([answer(b"<html>nginx</html>", "404 Not Found")]) as server:
        with pytest.raises(NotFound, match="answered with status 404") as caught:
            connect(server.url).predict("toy", START)
        assert caught.value.code == "http_404"


MALFORMED = {
    "not JSON": answer(b"<html></html>"),
    "no text": answer(b"\xff\xfe"),
    "nothing": answer(b""),
    "another document": answer(b'{"detail": "welcome"}'),
    "a list": answer(b"[]"),
    "a number": answer(b"1"),
    "nested without end": answer(b"[" * 200_000),
    "a redirect": answer(b"", "302 Found"),
    "too few sequences": changed(predictions=[]),
    "no predictions": changed(predictions=None),
    "version is text": changed(version="2"),
    "version is a truth value": changed(version=True),
    "model is null": changed(model=None),
    "row without experts": changed(predictions=[[{"layer": 1}]]),
    "experts are fractions": with_row(experts=[3.5, 0.5]),
    "experts are text": with_row(experts=["3", "0"]),
    "expert below 0": with_row(experts=[3, -2]),
    "expert beyond 32 bits": with_row(experts=[3, 2**40]),
    "expert beyond 64 bits": with_row(experts=[3, 2**70]),
    "more experts than probabilities": with_row(experts=[3, 0, 1]),
    "experts are null": with_row(experts=None),
    "no experts": with_row(experts=[], probabilities=[]),
    "nested experts": with_row(experts=[[3], [0]]),
    "probability above 1": with_row(probabilities=[1.5, 0.1]),
    "probability is not a number": answer(json.dumps(GOOD).replace("0.9", "NaN").encode()),
    "probability is text": with_row(probabilities=["0.9", "0.1"]),
    "probability is null": with_row(probabilities=[None, 0.1]),
    "layer is text": with_row(layer="one"),
    "expected recall is missing": with_row(expected_recall=None),
}


@pytest.mark.parametrize("behaviour", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_answer_is_no_prediction(connect: Any, behaviour: Behaviour) -> None:
    with OddServer([behaviour]) as server:
        client = connect(server.url)
        assert client.predict("toy", START) is None
        assert isinstance(client.last_failure, AnswerInvalid), client.last_failure


@pytest.mark.parametrize("body", [b"{}", b'{"models": [{"model": "toy"}]}', b'{"models": 3}', b"[]"])
def test_a_malformed_list_of_models_is_an_error(connect: Any, body: bytes) -> None:
    with OddServer([answer(body)]) as server, pytest.raises(AnswerInvalid, match="/v1/models"):
        connect(server.url).models()


def test_an_answer_that_grows_without_end_is_given_up(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmoe_client.exchange.MAX_ANSWER_BYTES", 100)
    with (
        OddServer([answer(b" " * 101)]) as server,
        pytest.raises(AnswerInvalid, match="larger than 100 bytes"),
    ):
        connect(server.url).predict("toy", START, on_failure="raise")


def test_failures_are_raised_when_asked_for(connect: Any) -> None:
    with (
        OddServer([hang_up]) as server,
        pytest.raises(NoPrediction, match="Check that the service runs"),
    ):
        connect(server.url).predict("toy", START, on_failure="raise")


def test_a_failure_is_logged_once_and_each_reason_for_itself(connect: Any, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG, logger="specmoe_client")
    with OddServer([hang_up, hang_up, refusal(500, "internal"), hang_up, refusal(500, "internal")]) as server:
        client = connect(server.url)
        for _ in range(5):
            client.predict("toy", START)
    reasons = [record.args[0] for record in caplog.records if record.name == "specmoe_client"]
    assert reasons == ["unreachable", "unavailable"]


def test_routing_is_never_logged(connect: Any, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    with OddServer([cut_off]) as server:
        connect(server.url).predict("toy", Sequence(experts=[[31337]], token_id=271828))
    assert "31337" not in caplog.text
    assert "271828" not in caplog.text


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://localhost", "http://", "", "http://a:b"])
def test_a_base_url_that_is_none_is_refused_at_once(connect: Any, url: str) -> None:
    with pytest.raises(ClientError, match="expected http://host:port"):
        connect(url)


@pytest.mark.parametrize("timeout_ms", [0, -1, float("nan")])
def test_a_deadline_must_be_positive(connect: Any, timeout_ms: float) -> None:
    with pytest.raises(ClientError, match="timeout_ms is"):
        connect(timeout_ms=timeout_ms)


@pytest.mark.parametrize("timeout_ms", [0, -1])
def test_the_deadline_of_a_call_must_be_positive(connect: Any, timeout_ms: float) -> None:
    with pytest.raises(ClientError, match="timeout_ms is"):
        connect().predict("toy", START, timeout_ms=timeout_ms)
