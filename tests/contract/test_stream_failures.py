"""The real streams against a service that dies, refuses, falls silent or talks nonsense: by real sockets."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from specmoe_client import (
    AnswerInvalid,
    AnswerLate,
    AsyncStream,
    MessageRefused,
    NotFound,
    RequestInvalid,
    RequestRefused,
    ServiceUnavailable,
    ServiceUnreachable,
    Stream,
    Token,
)

from tests.contract.odd_server import OddServer, hang_up, no_http, refusal
from tests.contract.streams import until
from tests.contract.test_failures import closed_port
from tests.contract.test_stream import GATES, LAYER, PATIENT_MS, connected, tell_token
from tests.contract.toy_book import HEADER, LAYERS, Behaviour, Told, ranked
from tests.contract.toy_stream import ToyStream

WHOLE = [([3, 1], [0.75, 0.25])] * LAYERS


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests need not wait as long as programs should."""
    monkeypatch.setattr("specmoe_client.streaming.retry.LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr("specmoe_client.streaming.ledger.REOPEN_AFTER_S", 0.05)


def lost(stream: Any) -> bool:
    """Whether the stream has noticed that its connection is gone."""
    stream.latest_union()
    return stream.status.state != "connected"


def reconnected(stream: Any, server: ToyStream, connections: int = 2) -> None:
    until(lambda: lost(stream) or len(server.connections) >= connections)
    assert stream.ready()
    until(lambda: len(server.connections) >= connections)


def forecast_of(stream: Any, sequence: int) -> list[int]:
    """The ranking of the first layer of the newest forecast."""
    forecast = stream.wait(sequence, PATIENT_MS)
    assert forecast is not None, stream.last_failure
    ranking: list[int] = forecast.experts[0].tolist()
    return ranking


def test_a_dead_service_is_no_prediction(open_stream: Any) -> None:
    stream = open_stream(f"http://127.0.0.1:{closed_port()}")
    assert not stream.ready(timeout_ms=100)
    sequence = stream.open()
    tell_token(stream, sequence)
    stream.start([sequence], [8])
    assert stream.wait(sequence, PATIENT_MS) is None
    assert stream.latest(sequence) is None
    assert isinstance(stream.last_failure, ServiceUnreachable)
    assert stream.status.state == "broken"


def test_a_socket_file_that_is_not_there_is_no_prediction(open_stream: Any, tmp_path: Path) -> None:
    stream = open_stream(uds=str(tmp_path / "none.sock"))
    assert not stream.ready(timeout_ms=50)
    assert stream.last_failure.reason == "unreachable"


def test_a_failure_is_raised_where_that_is_wanted(open_stream: Any) -> None:
    stream = open_stream(f"http://127.0.0.1:{closed_port()}")
    assert not stream.ready(timeout_ms=50)
    sequence = stream.open()
    stream.start([sequence])
    with pytest.raises(ServiceUnreachable, match="livez"):
        until(lambda: stream.wait(sequence, PATIENT_MS, on_failure="raise"))


def test_a_service_that_comes_later_is_found(open_stream: Any) -> None:
    port = closed_port()
    stream = open_stream(f"http://127.0.0.1:{port}")
    assert not stream.ready(timeout_ms=50)
    sequence = stream.open(context=[Token(np.tile([3, 1], (LAYERS, 1)), np.tile(GATES, (LAYERS, 1)), 7)])
    stream.start([sequence], [8])
    with ToyStream(port=port):
        assert stream.ready()
        stream.route([sequence], LAYER)  # of a token that began before the model was known
        assert stream.latest(sequence) is None
        stream.start([sequence], [9])
        assert forecast_of(stream, sequence) == ranked(Told([(7, WHOLE)], 9), 0, 4)


def test_a_context_that_turns_out_wrong_is_told_of_and_left_out(open_stream: Any) -> None:
    port = closed_port()
    stream = open_stream(f"http://127.0.0.1:{port}")
    sequence = stream.open(context=[Token([[1, 2, 3]])])
    with ToyStream(port=port):
        assert stream.ready()
        assert isinstance(stream.last_failure, MessageRefused)
        stream.start([sequence], [9])
        assert forecast_of(stream, sequence) == ranked(Told(token_id=9), 0, 4)


def cut(server: ToyStream) -> None:
    server.connections[-1].cut()


def fault(server: ToyStream) -> None:
    server.connections[-1].close(1011)


def stopping(server: ToyStream) -> None:
    server.connections[-1].say_goodbye(1000)
    server.connections[-1].close(1001)


def crowded(server: ToyStream) -> None:
    server.connections[-1].close(4429)


ENDS = [cut, fault, stopping, crowded]


@pytest.mark.parametrize("end", ENDS, ids=[end.__name__ for end in ENDS])
def test_after_a_lost_connection_the_service_knows_all_again(
    open_stream: Any, end: Callable[[ToyStream], None]
) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequences = [stream.open(), stream.open()]
        for sequence in sequences:
            tell_token(stream, sequence)
        stream.start(sequences, [8, 9])
        stream.route(sequences, LAYER * 2, GATES * 2)
        end(server)
        reconnected(stream, server)
        assert [forecast_of(stream, sequence) for sequence in sequences] == [
            ranked(Told([(7, WHOLE)], token_id, WHOLE[:1]), 1, 4) for token_id in (8, 9)
        ]
        assert server.connections[1].book.refused == []


def test_what_happens_while_the_service_is_away_is_told_later(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        tell_token(stream, sequence, 5)
    until(lambda: lost(stream))
    tell_token(stream, sequence, 6)
    stream.start([sequence], [7])
    stream.end([sequence])
    stream.start([sequence], [8])
    stream.route([sequence], LAYER, GATES)
    opened = stream.open()
    stream.close_sequences([stream.open()])
    with ToyStream(port=server.port) as server:
        assert stream.ready()
        stream.start([opened], [9])
        assert forecast_of(stream, sequence) == ranked(Told([(5, WHOLE), (6, WHOLE)], 8, WHOLE[:1]), 1, 4)
        assert forecast_of(stream, opened) == ranked(Told(token_id=9), 0, 4)
        assert len(server.connections[0].book.sequences) == 2


def test_a_service_that_restarts_on_a_unix_socket_is_found_again(open_stream: Any, tmp_path: Path) -> None:
    uds = str(tmp_path / "s.sock")
    stream = open_stream(uds=uds)
    sequence = None
    for token_id in (7, 8):
        with ToyStream(uds=uds):
            assert stream.ready()
            sequence = stream.open() if sequence is None else sequence
            tell_token(stream, sequence, token_id)
        until(lambda: lost(stream))
        Path(uds).unlink(missing_ok=True)
    with ToyStream(uds=uds):
        assert stream.ready()
        stream.start([sequence], [9])
        assert forecast_of(stream, sequence) == ranked(Told([(7, WHOLE), (8, WHOLE)], 9), 0, 4)


def test_a_forecast_that_came_is_still_there_when_the_connection_is_not(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        stream.wait(sequence, PATIENT_MS)
    until(lambda: lost(stream))
    assert stream.latest(sequence).seen == 0
    stream.route([sequence], LAYER)
    assert stream.wait(sequence, PATIENT_MS) is None


def test_an_asked_for_forecast_is_asked_for_again(open_stream: Any) -> None:
    with ToyStream(Behaviour(mute=True)) as server:
        stream = connected(open_stream, server, every=0, at_start=False)
        sequence = stream.open()
        stream.start([sequence], [7])
        stream.route([sequence], LAYER, GATES)
        stream.ask([sequence])
        server.behaviour = Behaviour()
        cut(server)
        reconnected(stream, server)
        assert forecast_of(stream, sequence) == ranked(Told([], 7, WHOLE[:1]), 1, 4)


def test_a_wait_is_over_when_the_connection_is(open_stream: Any) -> None:
    with ToyStream(Behaviour(mute=True)) as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        timer = threading.Timer(0.05, cut, [server])
        timer.start()
        assert stream.wait(sequence, 60_000) is None
        timer.join()
        assert isinstance(stream.last_failure, ServiceUnreachable)


def test_after_goodbye_the_stream_goes_on_until_the_service_closes(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        server.connections[0].say_goodbye(1500)
        sequence = stream.open()
        stream.start([sequence], [7])
        assert forecast_of(stream, sequence) == ranked(Told(token_id=7), 0, 4)
        assert (stream.status.state, stream.status.milliseconds_left) == ("connected", 1500)
        server.connections[0].close(1001)
        reconnected(stream, server)
        assert stream.status.milliseconds_left is None


def test_an_expired_sequence_is_opened_again_when_it_is_used(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        tell_token(stream, sequence)
        talk = server.connections[0]
        (wire,) = until(lambda: list(talk.book.sequences))
        until(lambda: len(talk.book.sequences[wire].past) == 1)
        talk.act(lambda book: book.expire(wire))
        stream.start([sequence], [8])
        until(lambda: lost(stream) or talk.book.refused or talk.book.sequences)
        stream.route([sequence], LAYER, GATES)
        until(lambda: stream.latest(sequence))
        assert forecast_of(stream, sequence) == ranked(Told([(7, WHOLE)], 8, WHOLE[:1]), 1, 4)
        assert list(talk.book.sequences) != [wire]


def test_a_refused_message_is_no_end_and_its_sequence_is_opened_again(
    open_stream: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with ToyStream(Behaviour(max_sequences=1)) as server, caplog.at_level(logging.WARNING):
        stream = connected(open_stream, server)
        first, second = stream.open(), stream.open()
        stream.start([first], [7])
        stream.start([second], [8])
        assert forecast_of(stream, first) == ranked(Told(token_id=7), 0, 4)
        until(lambda: stream.latest(first) and isinstance(stream.last_failure, MessageRefused))
        assert stream.last_failure.code in ("sequences_exhausted", "invalid_message")
        assert stream.wait(second, PATIENT_MS) is None
        stream.close_sequences([first])
        until(lambda: stream.wait(second, 100))
        assert forecast_of(stream, second) == ranked(Told(token_id=8), 0, 4)
        assert len(server.connections) == 1
    assert sum("refused" in record.getMessage() for record in caplog.records) == 1


def test_a_sequence_that_is_opened_again_is_not_left_open_under_its_old_number(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        talk = server.connections[0]
        until(lambda: talk.book.kinds[-1:] == ["start"])
        (wire,) = talk.book.sequences
        talk.fail(talk.book.tags[-1], "odd")
        until(lambda: stream.latest_union() or stream.last_failure)
        until(lambda: stream.wait(sequence, 100) and wire not in talk.book.sequences)
        assert forecast_of(stream, sequence) == ranked(Told(token_id=7), 0, 4)
        assert talk.book.refused == []


def test_an_error_without_a_tag_is_told_of(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        server.connections[0].fail(0, "odd")
        until(lambda: stream.latest_union() or stream.last_failure)
        assert (stream.last_failure.code, stream.last_failure.reason) == ("odd", "refused")
        assert stream.status.state == "connected"


REFUSALS = {
    "no such model": (4404, "model_not_found", NotFound, 404),
    "a wrong hello": (4400, "invalid_message", RequestInvalid, 400),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refused_stream_is_raised_by_ready_and_not_tried_again(
    open_stream: Any, case: tuple[int, str, type[RequestRefused], int]
) -> None:
    close_code, code, kind, status = case
    with ToyStream(Behaviour(close_at_hello=(close_code, code))) as server:
        stream = open_stream(server.url)
        with pytest.raises(kind, match="It is so") as caught:
            stream.ready()
        assert (caught.value.code, caught.value.status, caught.value.remedy) == (code, status, "Do this.")
        assert stream.last_failure is caught.value
        assert stream.status.state == "refused"
        sequence = stream.open()
        stream.start([sequence])
        assert stream.wait(sequence, PATIENT_MS) is None
        assert len(server.connections) == 1


def test_a_service_that_is_not_ready_is_tried_again(open_stream: Any) -> None:
    with ToyStream(Behaviour(close_at_hello=(4503, "not_ready"))) as server:
        stream = open_stream(server.url)
        until(lambda: len(server.connections) > 2)
        assert isinstance(stream.last_failure, ServiceUnavailable)
        assert (stream.last_failure.status, stream.last_failure.code) == (503, "not_ready")
        server.behaviour = Behaviour()
        assert stream.ready()


def test_the_words_of_a_refusal_before_hello_are_those_of_its_close(open_stream: Any) -> None:
    with ToyStream(Behaviour(first_words='{"type": "error"}')) as server:
        stream = open_stream(server.url)
        until(lambda: server.connections)
        server.connections[0].close(4429, "too many streams")
        until(lambda: stream.last_failure)
        assert isinstance(stream.last_failure, ServiceUnavailable)
        assert "too many streams" in str(stream.last_failure)


NO_STREAMS = {
    "hangs up": (hang_up, ServiceUnreachable),
    "speaks no HTTP": (no_http, ServiceUnreachable),
    "is too busy": (refusal(503, "busy"), ServiceUnavailable),
    "has no such path": (refusal(404, "not_found"), NotFound),
    "wants no pages": (refusal(403, "origin_refused"), RequestRefused),
}


@pytest.mark.parametrize("case", NO_STREAMS.values(), ids=NO_STREAMS.keys())
def test_a_server_without_streams_is_named(open_stream: Any, case: tuple[Any, type[Exception]]) -> None:
    behaviour, kind = case
    with OddServer([behaviour]) as server:
        stream = open_stream(server.url)
        failure = until(lambda: stream.last_failure)
        assert isinstance(failure, kind)
        assert (stream.status.state == "refused") == issubclass(kind, RequestRefused)


def ranking(**fields: int) -> bytes:
    """A forecast of sequence 0 that is too short, unless told otherwise."""
    header = {"kind": 129, "count": 1, "first_layer": 0, "layers": 1, "bytes": 6} | fields
    body = struct.pack("<II", 0, 0) + bytes(header["bytes"])
    numbers = header["kind"], 0, header["count"], 0, header["first_layer"], header["layers"], 0
    return HEADER.pack(*numbers) + body


GARBAGE: dict[str, bytes | str] = {
    "text": "hello",
    "nothing": b"",
    "less than a header": b"\x81\x00",
    "unknown kind": HEADER.pack(200, 0, 0, 0, 0, 0, 0),
    "a client's kind": HEADER.pack(3, 0, 0, 0, 0, 0, 0),
    "welcome again": HEADER.pack(128, 0, 0, 0, 0, 0, 0) + bytes(24),
    "forecast of no sequence": ranking(count=0),
    "forecast of no layer": ranking(layers=0),
    "forecast of a layer that is none": ranking(first_layer=LAYERS, bytes=7),
    "forecast with half an expert": ranking(bytes=9),
    "forecast without experts": ranking(bytes=2),
    "forecast with sizes of one sequence for two": ranking(count=2, bytes=8 + 2 * 5 + 2),
    "union with half an expert": ranking(kind=130, bytes=9),
    "error that is no JSON": HEADER.pack(131, 0, 0, 0, 0, 0, 4) + b"oops",
    "error that says nothing": HEADER.pack(131, 0, 0, 0, 0, 0, 2) + b"{}",
    "expired beyond its end": HEADER.pack(133, 0, 3, 0, 0, 0, 0) + bytes(4),
    "goodbye with more": HEADER.pack(132, 0, 0, 0, 0, 0, 1) + b"x",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_ends_the_connection_and_nothing_else(open_stream: Any, garbage: bytes | str) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        server.connections[0].say(garbage)
        until(lambda: isinstance((lost(stream), stream.last_failure)[1], AnswerInvalid))
        assert stream.ready()
        assert forecast_of(stream, sequence) == ranked(Told(token_id=7), 0, 4)


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"\x80",
        HEADER.pack(128, 0, 0, 0, 0, 0, 3) + struct.pack("<HHHHIIII", 4, 8, 2, 9, 1, 1, 1, 1),
        HEADER.pack(128, 0, 0, 0, 0, 0, 3) + struct.pack("<HHHHIIII", 0, 8, 2, 1, 1, 1, 1, 1),
        ranking(bytes=7),
    ],
    ids=["nothing", "one byte", "another protocol", "no layers", "a forecast"],
)
def test_a_welcome_that_is_none_is_no_connection(open_stream: Any, words: bytes) -> None:
    with ToyStream(Behaviour(first_words=words)) as server:
        stream = open_stream(server.url)
        assert isinstance(until(lambda: stream.last_failure), AnswerInvalid)
        server.behaviour = Behaviour()
        assert stream.ready()


def test_bytes_that_are_no_websocket_end_the_connection(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        server.connections[0].write(b"\xff\xff\xff\xff")
        until(lambda: isinstance((lost(stream), stream.last_failure)[1], AnswerInvalid))
        assert stream.ready()


def test_a_model_that_comes_back_in_another_shape_starts_anew(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        tell_token(stream, sequence)
        stream.start([sequence], [8])
        server.behaviour = Behaviour(layers=2)
        cut(server)
        reconnected(stream, server)
        assert stream.status.spec.num_layers == 2
        stream.route([sequence], LAYER)
        stream.start([sequence], [9])
        assert forecast_of(stream, sequence) == ranked(Told(token_id=9), 0, 4)


def test_a_service_that_falls_silent_costs_no_more_waits(open_stream: Any) -> None:
    with ToyStream(Behaviour(late=True)) as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        while stream.status.state == "connected":
            assert stream.wait(sequence, 1) is None
        assert stream.status.state == "silent"
        assert isinstance(stream.last_failure, AnswerLate)
        began = time.monotonic()
        assert stream.wait(sequence, 60_000) is None  # would be a minute
        assert time.monotonic() < began + 30
        server.connections[0].act(lambda book: book.release())
        assert until(lambda: stream.latest(sequence))
        assert stream.status.state == "connected"


def test_a_service_that_does_not_read_is_given_up(open_stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmoe_client.streaming.link.MAX_PENDING_BYTES", 1 << 16)
    with ToyStream(Behaviour(deaf=True)) as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        while not lost(stream):
            tell_token(stream, sequence)
        assert "did not read" in str(stream.last_failure)


def test_a_service_that_gives_no_sign_of_life_is_given_up(
    open_stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoe_client.streaming.keeper.BEAT_SECONDS", 0.05)
    with ToyStream(Behaviour(deaf=True)) as server:
        stream = connected(open_stream, server)
        for sequence in [stream.open() for _ in range(20)]:  # more messages than it buffers
            tell_token(stream, sequence)
        until(lambda: isinstance(stream.last_failure, ServiceUnreachable))
        assert "sign of life" in str(stream.last_failure)


def test_an_idle_stream_stays_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmoe_client.streaming.keeper.BEAT_SECONDS", 0.02)
    with ToyStream() as server, Stream(server.url, model="toy") as stream:
        assert stream.ready()
        time.sleep(0.3)
        assert stream.status.state == "connected"
        assert len(server.connections) == 1


def test_an_idle_stream_is_connected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmoe_client.streaming.keeper.BEAT_SECONDS", 0.02)
    with ToyStream() as server, Stream(server.url, model="toy") as stream:
        assert stream.ready()
        cut(server)
        until(lambda: len(server.connections) == 2 and stream.status.state == "connected")


def test_closing_while_there_is_no_connection_ends_the_thread(open_stream: Any) -> None:
    before = threading.active_count()
    stream = open_stream(f"http://127.0.0.1:{closed_port()}")
    stream.close()
    assert threading.active_count() == before


def test_one_task_that_looks_does_not_keep_another_waiting() -> None:
    async def run(server: ToyStream) -> Any:
        async with AsyncStream(server.url, model="toy") as stream:
            assert await stream.ready()
            first, second = stream.open(), stream.open()
            stream.start([first, second], [7, 8])
            waiting = asyncio.create_task(stream.forecast(first, PATIENT_MS))
            await asyncio.sleep(0)
            while stream.latest(second) is None:
                time.sleep(0.001)  # the loop itself never sees the bytes
            return await waiting

    with ToyStream() as server:
        assert asyncio.run(run(server)).seen == 0


def test_a_stuck_accept_is_not_waited_for_when_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmoe_client.streaming.keeper.STOP_SECONDS", 0.05)
    monkeypatch.setattr("specmoe_client.streaming.connecting.CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stream = Stream(f"http://127.0.0.1:{listening.getsockname()[1]}", model="toy")
        stream.close()
        assert stream.status.state == "closed"
    until(lambda: not any(thread.name == "specmoe-stream" for thread in threading.enumerate()))
