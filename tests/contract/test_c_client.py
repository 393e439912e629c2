"""The C client against the real service, over both kinds of socket: its answers are the Python client's.

.venv/bin/python -m pytest tests/contract/test_c_client.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from specmoe_client import Stream

from model_store.store import open_store
from tests.contract.c_client import COMPILERS, GONE, INVALID, LOST, OK, Driver, compiled
from tests.contract.running import running_service
from tests.contract.streams import PATIENCE_S, until
from tests.contract.toy_book import Behaviour, Told, ranked, set_size
from tests.contract.toy_stream import ToyStream
from tests.toy_version import toy_version
from traces.spec import RoutingSpec

LAYERS, EXPERTS, TOP_K = 4, 8, 2
PATIENT_MS = PATIENCE_S * 1000
LAYER = [[[0, 1]]]
TOKEN = [[[0, 1], [2, 3], [4, 5], [6, 7]]]


@pytest.fixture(scope="module", params=COMPILERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("driver.c", tmp_path_factory.mktemp("c"), language=request.param)


@pytest.fixture
def client(program: Path) -> Iterator[Driver]:
    with Driver(program) as driver:
        yield driver


def routing(
    random: np.random.Generator, spec: tuple[int, int, int], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """(experts, gates), made up: `[rows, L, K]`."""
    layers, experts, top_k = spec
    ids = np.array([[random.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(rows)])
    return ids, random.random(ids.shape).astype(np.float32) + np.float32(0.1)


def assert_same(answer: dict[str, Any], forecast: Any) -> None:
    """The C client's forecast is the Python client's."""
    assert answer["code"] == 1, answer["error"]
    assert forecast is not None
    assert (answer["token"], answer["first_layer"]) == (forecast.token, forecast.seen)
    assert answer["sizes"] == forecast.sizes.tolist()
    np.testing.assert_array_equal(answer["experts"], forecast.experts)
    np.testing.assert_allclose(answer["probabilities"], forecast.probabilities, atol=1e-6)


def test_it_tells_what_it_is_connected_to(client: Driver, service: dict[str, Any]) -> None:
    assert client.connect(service) == {"code": OK, "error": ""}
    status = client.status()
    assert (status["version"], status["shape"]) == (2, [LAYERS, EXPERTS, TOP_K])
    assert (status["uses_token_ids"], status["uses_gates"], status["milliseconds_left"]) == (1, 1, -1)


def test_forecasts_are_those_of_the_python_client(client: Driver, service: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    client.connect(service, top_n=3)
    with Stream(**service, model="toy", top_n=3) as stream:
        assert stream.ready()
        sequence = stream.open()
        client("open", [5])
        for token_id in (7, 11, 3):
            experts, gates = routing(random, (LAYERS, EXPERTS, TOP_K), 1)
            client.start([5], [token_id])
            stream.start([sequence], [token_id])
            for layer in range(LAYERS):
                assert_same(client.wait(5), stream.wait(sequence, PATIENT_MS))
                told = slice(layer, layer + 1)
                assert client.route([5], experts[:, told], gates[:, told])["code"] == OK
                stream.route([sequence], experts[:, told], gates[:, told])


def test_a_batch_in_one_message_is_forecast_as_the_python_client_has_it(
    client: Driver, service: dict[str, Any]
) -> None:
    random = np.random.default_rng(2)
    options: dict[str, Any] = {"coverage": 0.9, "ahead": 2, "every": 2}
    client.connect(service, **options)
    ours = [0, 63, 9]
    with Stream(**service, model="toy", **options) as stream:
        assert stream.ready()
        theirs = [stream.open() for _ in ours]
        client("open", ours)
        for _ in range(2):
            experts, gates = routing(random, (LAYERS, EXPERTS, TOP_K), len(ours))
            client.start(ours, [1, 2, 3])
            stream.start(theirs, [1, 2, 3])
            for told in (slice(0, 0), slice(0, 3), slice(3, 4)):
                if told.stop:
                    client.route(ours, experts[:, told], gates[:, told])
                    stream.route(theirs, experts[:, told], gates[:, told])
                if told.stop < LAYERS:
                    for our, their in zip(ours, theirs, strict=True):
                        assert_same(client.wait(our), stream.wait(their, PATIENT_MS))


@pytest.mark.parametrize("adapt", [False, True])
def test_coverage_adapts_where_the_program_wants_it(client: Driver, adapt: bool) -> None:
    with ToyStream() as server:
        client.connect(server.url, coverage=0.9, adapt=adapt)
        assert server.connections[0].book.hello["adapt"] is adapt


def test_each_sequence_of_a_batch_has_sets_of_its_own_size(client: Driver) -> None:
    told = {0: Told(token_id=5), 63: Told(token_id=6), 9: Told(token_id=7)}
    sizes = {sequence: [set_size(one, layer) for layer in range(LAYERS)] for sequence, one in told.items()}
    assert list(sizes.values()) == [[3, 5, 4, 6], [8, 4, 8, 3], [4, 7, 6, 3]]
    with ToyStream() as server:
        client.connect(server.url, coverage=0.9)
        client("open", list(told))
        client.start(list(told), [5, 6, 7])
        answers = {sequence: client.wait(sequence) for sequence in told}
    for sequence, one in told.items():
        answer = answers[sequence]
        assert (answer["code"], answer["sizes"]) == (1, sizes[sequence])
        width = max(max(of_one) for of_one in sizes.values())
        assert answer["experts"].tolist() == [ranked(one, layer, width) for layer in range(LAYERS)]


def test_a_model_of_many_experts_is_told_in_two_bytes(client: Driver, tmp_path: Path) -> None:
    spec = RoutingSpec(model="wide", num_layers=3, num_experts=300, top_k=4)
    open_store(tmp_path / "store").publish(*toy_version(spec), aliases=["production"])
    random = np.random.default_rng(3)
    with running_service(tmp_path / "store", "--uds", str(tmp_path / "s")) as service:
        assert client.connect(service, model="wide", version="production")["code"] == OK
        with Stream(**service, model="wide") as stream:
            assert stream.ready()
            sequence = stream.open()
            client("open", [1])
            experts, gates = routing(random, (3, 300, 4), 1)
            client.start([1])
            stream.start([sequence])
            client.route([1], experts[:, :2], gates[:, :2])
            stream.route([sequence], experts[:, :2], gates[:, :2])
            answer = client.wait(1)
            assert_same(answer, stream.wait(sequence, PATIENT_MS))
            assert answer["width"] == 8


def test_a_token_without_ids_and_gates_is_forecast_too(client: Driver, service: dict[str, Any]) -> None:
    client.connect(service)
    with Stream(**service, model="toy") as stream:
        assert stream.ready()
        sequence = stream.open()
        client("open", [0])
        client.start([0])
        stream.start([sequence])
        client.route([0], LAYER)
        stream.route([sequence], LAYER)
        assert_same(client.wait(0), stream.wait(sequence, PATIENT_MS))


def test_forecasts_come_when_they_are_asked_for_where_none_come_by_themselves(
    client: Driver, service: dict[str, Any]
) -> None:
    client.connect(service, every=0, at_start=False)
    client("open", [0])
    client.start([0], [7])
    client.route([0], LAYER)
    assert client.wait(0)["code"] == 0
    client("ask", [0])
    assert client.wait(0)["first_layer"] == 1
    assert client.latest(0)["first_layer"] == 1


def test_a_token_that_ended_early_is_forgotten(client: Driver, service: dict[str, Any]) -> None:
    client.connect(service)
    client("open", [0, 1])
    client.start([0], [7])
    client.route([0], LAYER)
    client("end", [0])
    assert client.latest(0)["code"] == 0
    client.start([0, 1], [8, 8])
    answers = [client.wait(sequence) for sequence in (0, 1)]
    assert [answer["token"] for answer in answers] == [1, 0]
    np.testing.assert_array_equal(answers[0]["probabilities"], answers[1]["probabilities"])


def test_a_server_with_many_files_open_is_forecast_too(client: Driver, service: dict[str, Any]) -> None:
    if client.crowd() < 0:
        pytest.skip("this system does not allow more than 1024 open files")
    assert client.connect(service)["code"] == OK
    client("open", [0])
    client.start([0], [7])
    assert client.wait(0)["first_layer"] == 0
    client.route([0], LAYER)
    assert client.wait(0)["first_layer"] == 1


def test_a_forecast_of_an_earlier_token_is_never_given(client: Driver, service: dict[str, Any]) -> None:
    client.connect(service)
    client("open", [0])
    client.start([0], [7])
    assert client.wait(0)["code"] == 1
    client.route([0], TOKEN)
    assert (client.latest(0)["code"], client.wait(0)["code"]) == (0, 0)


def test_a_sequence_that_is_opened_again_has_no_past(client: Driver, service: dict[str, Any]) -> None:
    client.connect(service, max_sequences=1)
    client("open", [0])
    client.start([0], [7])
    first = client.wait(0)
    client.route([0], TOKEN)
    client("close", [0])
    client("open", [0])
    client.start([0], [7])
    again = client.wait(0)
    assert (again["token"], again["first_layer"]) == (0, 0)
    np.testing.assert_array_equal(again["probabilities"], first["probabilities"])


WRONG: dict[str, tuple[Any, str]] = {
    "not open": (lambda client: client("end", [3]), "Sequence 3 is not open"),
    "open already": (lambda client: client("open", [0]), "Sequence 0 is open already"),
    "no sequence": (lambda client: client("ask", []), "0 sequences came, expected 1 to 64"),
    "too many": (lambda client: client("ask", [0] * 65), "65 sequences came"),
    "a number too high": (lambda client: client("open", [64]), "Sequence 64 came, expected numbers below"),
    "twice": (lambda client: client("ask", [0, 0]), "Sequence 0 stands twice"),
    "within a token": (lambda client: client.start([0], [1]), "1 of its 4 layers were told"),
    "between tokens": (lambda client: client.route([1], LAYER), "Sequence 1 is between two tokens"),
    "at different layers": (lambda client: client.route([0, 2], LAYER * 2), "Sequence 2 is at layer 0"),
    "too many layers": (lambda client: client.route([0], TOKEN), "4 layers came, expected 1 to the 3"),
    "no layers": (lambda client: client.route([0], LAYER, layers=-1), "-1 layers came"),
    "no such expert": (lambda client: client.route([0], [[[0, 8]]]), "Expert 8 came, expected 0 to 7"),
    "an expert below 0": (lambda client: client.route([0], [[[0, -1]]]), "Expert -1 came"),
    "an expert twice": (lambda client: client.route([0], [[[5, 5]]]), "Expert 5 stands twice"),
    "a gate below 0": (lambda client: client.route([0], LAYER, [-0.5, 1]), "Gate -0.5 came"),
    "a gate that is no number": (lambda client: client.route([0], LAYER, [float("nan"), 1]), "Gate"),
    "no gate above 0": (lambda client: client.route([0], LAYER, [0, 0]), "all 0"),
    "no token id": (lambda client: client.start([1], [-2]), "Token id -2 came"),
}


def test_wrong_use_is_told_and_changes_nothing(client: Driver, service: dict[str, Any]) -> None:
    client.connect(service)
    client("open", [0, 1, 2])
    client.start([0, 2], [7, 8])
    client.route([0], LAYER)
    for name, (use, words) in WRONG.items():
        answer = use(client)
        assert answer["code"] == INVALID, name
        assert words in answer["error"], name
    assert client.wait(0)["first_layer"] == 1
    assert client.route([0], [TOKEN[0][1:]])["code"] == OK
    client.start([0, 1], [9, 9])
    assert [client.wait(sequence)["token"] for sequence in (0, 1)] == [1, 0]


def test_a_message_that_the_service_would_not_take_is_not_sent(client: Driver) -> None:
    with ToyStream(Behaviour(max_frame_bytes=48)) as server:
        client.connect(server.url)
        client("open", [0])
        client.start([0], [7])
        answer = client.route([0], TOKEN, np.ones((1, LAYERS, TOP_K)))
        assert (answer["code"], "the service takes 48 at most" in answer["error"]) == (INVALID, True)
        assert client.route([0], LAYER)["code"] == OK
        assert client.wait(0)["first_layer"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "none"}, "model_not_found"),
        ({"version": "9"}, "version_not_found"),
        ({"top_n": 3, "coverage": 0.9}, "not both"),
        ({"coverage": 1.0}, "a coverage below 1"),
        ({"adapt": True}, "adapt needs a coverage"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"max_sequences": 65536}, "max_sequences is 65536"),
        ({"model": "m" * 1500}, "1500 bytes"),
    ],
)
def test_a_stream_that_is_refused_says_why(
    client: Driver, service: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    answer = client.connect(service, **options)
    assert answer["code"] == GONE
    assert words in answer["error"]


@pytest.mark.parametrize(
    "where",
    [
        "nowhere",
        "http://",
        "http://127.0.0.1",
        "http://127.0.0.1:80x",
        "unix:",
        "unix:/" + "p" * 200,
        "ws://a:1/x",
    ],
)
def test_an_address_that_is_none_is_told(client: Driver, where: str) -> None:
    answer = client.connect(where)
    assert answer["code"] == GONE
    assert "expected" in answer["error"]


def test_nobody_at_the_address_is_told(client: Driver, tmp_path: Path) -> None:
    assert "Cannot connect" in client.connect(f"unix:{tmp_path}/none")["error"]
    assert "Cannot connect" in client.connect("http://127.0.0.1:1")["error"]


def test_what_the_service_refuses_loses_the_sequence_and_nothing_else(client: Driver) -> None:
    with ToyStream(Behaviour(max_sequences=1)) as server:
        client.connect(server.url)
        client("open", [0])
        client("open", [1])
        client.start([0], [7])
        client.start([1], [8])
        assert client.wait(0)["code"] == 1
        answer = until(lambda: (told := client.wait(1, 1000))["code"] and told)
        assert answer["code"] == LOST
        assert "sequences_exhausted" in answer["error"] or "invalid_message" in answer["error"]
        assert client.route([1], LAYER)["code"] == LOST
        client("close", [0, 1])
        client("open", [1])
        client.start([1], [9])
        assert client.wait(1)["code"] == 1


def test_a_sequence_that_the_service_forgot_is_lost_until_it_is_opened_again(client: Driver) -> None:
    with ToyStream() as server:
        client.connect(server.url)
        client("open", [4])
        client.start([4], [7])
        assert client.wait(4)["code"] == 1
        talk = server.connections[0]
        (wire,) = talk.book.sequences
        talk.act(lambda book: book.expire(wire))
        answer = until(lambda: (told := client.latest(4))["code"] < 0 and told)
        assert (answer["code"], "forgot" in answer["error"]) == (LOST, True)
        client("close", [4])
        client("open", [4])
        client.start([4], [7])
        assert client.wait(4)["code"] == 1
        assert talk.book.refused == []


def test_goodbye_is_noted_and_the_end_is_told(client: Driver) -> None:
    with ToyStream() as server:
        client.connect(server.url)
        server.connections[0].say_goodbye(1500)
        until(lambda: client.poll()["code"] == OK and client.status()["milliseconds_left"] == 1500)
        server.connections[0].close(1001, "the service stopped")
        answer = until(lambda: (told := client.poll())["code"] and told)
        assert answer["code"] == GONE
        assert "the service stopped (close code 1001" in answer["error"]
        assert client("open", [0])["error"] == answer["error"]


def test_a_stream_that_is_closed_says_so(client: Driver) -> None:
    with ToyStream() as server:
        client.connect(server.url)
        client.connect(server.url)  # closes the first
        until(lambda: server.connections[0].closed_with)
        assert server.connections[0].closed_with == 1000
