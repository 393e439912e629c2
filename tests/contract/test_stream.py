"""The real streams against the toy service that follows the protocol: telling, forecasts, wrong use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from specmoe_client import ClientError, RequestInvalid, RoutingShape, Stream, Token

from tests.contract.streams import until
from tests.contract.toy_book import EXPERTS, LAYERS, TOP_K, VERSION, Behaviour, Told, ranked, set_size
from tests.contract.toy_stream import ToyStream

FINISHED = Token(experts=np.array([[1, 2], [3, 4], [5, 6], [7, 0]]), gates=np.full((4, 2), 0.5), token_id=11)
PAST = [(11, [([1, 2], [0.5, 0.5]), ([3, 4], [0.5, 0.5]), ([5, 6], [0.5, 0.5]), ([7, 0], [0.5, 0.5])])]
LAYER, GATES = [[3, 1]], [[0.75, 0.25]]
PATIENT_MS = 10_000.0


def connected(open_stream: Any, server: ToyStream, **options: Any) -> Any:
    stream = open_stream(server.url, **options)
    assert stream.ready()
    return stream


def tell_token(stream: Any, sequence: int, token_id: int = 7) -> None:
    """A whole token."""
    stream.start([sequence], [token_id])
    stream.route([sequence], np.tile(np.array(LAYER), (1, LAYERS, 1)), np.tile(GATES, (1, LAYERS, 1)))


def test_a_stream_tells_what_it_is_connected_to(open_stream: Any) -> None:
    with ToyStream() as server:
        status = connected(open_stream, server).status
    assert (status.state, status.version, status.last_failure) == ("connected", VERSION, None)
    assert status.spec == RoutingShape(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)


def test_a_stream_works_over_a_unix_socket(open_stream: Any, tmp_path: Path) -> None:
    uds = str(tmp_path / "s.sock")
    with ToyStream(uds=uds):
        assert open_stream(uds=uds).ready()


def test_a_path_before_the_streams_own_is_kept(open_stream: Any) -> None:
    with ToyStream() as server:
        assert open_stream(f"{server.url}/behind/a/proxy/").ready()


def test_hello_asks_for_what_the_program_wants(open_stream: Any) -> None:
    wants = {"model": "m", "version": 7, "union": True, "per_sequence": False, "ahead": 3}
    wants |= {"coverage": 0.95, "adapt": True}
    with ToyStream() as server:
        connected(open_stream, server, **wants, at_start=False, every=2, deadline_ms=1.5)
        assert server.connections[0].book.hello == {
            **wants,
            "version": "7",
            "at_start": False,
            "every": 2,
            "deadline_us": 1500,
            "top_n": 0,
        }


def test_a_forecast_comes_at_the_start_of_a_token_and_after_each_layer(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        seen = [stream.wait(sequence, PATIENT_MS).seen]
        for _ in range(LAYERS - 1):
            stream.route([sequence], LAYER)
            seen.append(stream.wait(sequence, PATIENT_MS).seen)
    assert seen == list(range(LAYERS))


def test_a_forecast_is_of_everything_that_was_told(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server, top_n=5)
        sequence = stream.open(context=[FINISHED])
        stream.start([sequence], [7])
        stream.route([sequence], LAYER, GATES)
        forecast = stream.wait(sequence, PATIENT_MS)
    told = Told(past=PAST, token_id=7, layers=[([3, 1], [0.75, 0.25])])
    assert forecast.experts.tolist() == [ranked(told, layer, 5) for layer in (1, 2, 3)]
    assert (forecast.sequence, forecast.token, forecast.seen) == (sequence, 0, 1)


def test_a_forecast_is_read_by_layer(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        stream.route([sequence], LAYER)
        forecast = stream.wait(sequence, PATIENT_MS)
    assert forecast.layers.tolist() == [1, 2, 3]
    assert forecast.sizes.tolist() == [4, 4, 4]
    assert forecast.experts_of(2).tolist() == forecast.experts[1].tolist()
    assert [forecast.experts_of(layer).size for layer in (0, 4)] == [0, 0]
    np.testing.assert_allclose(forecast.probabilities, np.tile(1 / np.arange(2.0, 6), (3, 1)), rtol=1e-6)


def test_a_forecast_stays_as_it_was_and_cannot_be_written_to(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        forecast = stream.wait(sequence, PATIENT_MS)
        experts, before = forecast.experts, forecast.experts.tolist()
        for _ in range(LAYERS - 1):
            stream.route([sequence], LAYER)
            stream.wait(sequence, PATIENT_MS)
    assert experts.tolist() == before
    assert not experts.flags.writeable


def test_a_batch_is_its_sequences(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequences = [stream.open(), stream.open(context=[FINISHED]), stream.open()]
        stream.start(sequences, [5, 6, 7])
        stream.route(sequences, [[0, 1], [2, 3], [4, 5]], [[1, 2], [3, 4], [5, 6]])
        forecasts = [stream.wait(sequence, PATIENT_MS) for sequence in sequences]
        assert server.connections[0].book.kinds.count("routing") == 1
    for position, forecast in enumerate(forecasts):
        experts, gates = [2 * position, 2 * position + 1], [2 * position + 1.0, 2 * position + 2.0]
        told = Told(PAST if position == 1 else [], 5 + position, [(experts, gates)])
        assert forecast.experts[0].tolist() == ranked(told, 1, 4)


def test_each_sequence_of_a_batch_has_sets_of_its_own_size(open_stream: Any) -> None:
    told = [Told([], 5), Told(PAST, 6), Told([], 7)]
    sizes = [[set_size(one, layer) for layer in range(LAYERS)] for one in told]
    assert sizes == [[3, 5, 4, 6], [8, 2, 8, 6], [4, 7, 6, 3]]
    with ToyStream() as server:
        stream = connected(open_stream, server, coverage=0.9, union=True)
        sequences = [stream.open(), stream.open(context=[FINISHED]), stream.open()]
        stream.start(sequences, [5, 6, 7])
        forecasts = [stream.wait(sequence, PATIENT_MS) for sequence in sequences]
        union = stream.wait_union(PATIENT_MS)
    assert [forecast.sizes.tolist() for forecast in forecasts] == sizes
    for forecast, one in zip(forecasts, told, strict=True):
        for layer in range(LAYERS):
            expected = ranked(one, layer, set_size(one, layer))
            assert forecast.experts_of(layer).tolist() == expected
    assert union.sizes.tolist() == sizes[0]
    assert union.experts_of(1).tolist() == ranked(told[0], 1, sizes[0][1])


def test_several_layers_may_be_told_at_once(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        stream.route([sequence], [[[3, 1], [2, 0]]], [[[1, 2], [3, 4]]])
        forecast = stream.wait(sequence, PATIENT_MS)
    told = Told(token_id=7, layers=[([3, 1], [1.0, 2.0]), ([2, 0], [3.0, 4.0])])
    assert (forecast.seen, forecast.experts[0].tolist()) == (2, ranked(told, 2, 4))


def test_the_last_layer_ends_the_token_and_makes_it_history(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        tell_token(stream, sequence, 7)
        assert stream.latest(sequence) is None
        stream.start([sequence], [8])
        forecast = stream.wait(sequence, PATIENT_MS)
    told = Told(past=[(7, [([3, 1], [0.75, 0.25])] * LAYERS)], token_id=8)
    assert (forecast.token, forecast.experts[0].tolist()) == (1, ranked(told, 0, 4))


def test_a_token_that_ends_early_is_forgotten(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        stream.start([sequence], [7])
        stream.route([sequence], LAYER)
        stream.end([sequence])
        assert stream.latest(sequence) is None
        stream.start([sequence], [8])
        forecast = stream.wait(sequence, PATIENT_MS)
    assert forecast.experts[0].tolist() == ranked(Told(token_id=8), 0, 4)


def test_a_late_forecast_of_an_earlier_token_is_never_shown(open_stream: Any) -> None:
    with ToyStream(Behaviour(late=True)) as server:
        stream = connected(open_stream, server)
        sequence = stream.open()
        tell_token(stream, sequence)
        stream.start([sequence], [8])
        stream.route([sequence], LAYER)
        talk = server.connections[0]
        until(lambda: talk.book.kinds[-2:] == ["start", "routing"])
        held = talk.book.held
        for earlier in held[:-2]:
            talk.say(earlier)
        assert stream.wait(sequence, 20) is None
        assert stream.latest(sequence) is None
        talk.say(held[-2])
        assert until(lambda: stream.latest(sequence)).seen == 0
        talk.say(held[-1])
        assert stream.wait(sequence, PATIENT_MS).seen == 1


def test_latest_gives_an_older_forecast_of_the_token_until_a_newer_one_comes(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server, every=3)
        sequence = stream.open()
        stream.start([sequence], [7])
        assert stream.wait(sequence, PATIENT_MS).seen == 0
        stream.route([sequence], LAYER)
        assert stream.latest(sequence).seen == 0
        assert stream.wait(sequence, PATIENT_MS).seen == 0
        stream.route([sequence], [[[3, 1], [2, 0]]])
        assert stream.wait(sequence, PATIENT_MS).seen == 3


def test_a_forecast_can_be_asked_for(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server, every=0, at_start=False)
        sequences = [stream.open(), stream.open()]
        stream.start(sequences, [7, 8])
        assert stream.wait(sequences[0], PATIENT_MS) is None
        stream.route(sequences[:1], LAYER)
        stream.ask(sequences)
        seen = [stream.wait(sequence, PATIENT_MS).seen for sequence in sequences]
    assert seen == [1, 0]


def test_a_forecast_that_was_overtaken_is_asked_for_when_it_is_waited_for(open_stream: Any) -> None:
    odd = Behaviour(late=True)
    with ToyStream(odd) as server:
        stream = connected(open_stream, server, every=0, union=True)
        sequences = [stream.open(), stream.open()]
        stream.start(sequences, [7, 8])
        stream.route(sequences, LAYER * 2, GATES * 2)
        talk = server.connections[0]
        until(lambda: "routing" in talk.book.kinds)
        odd.late = False  # what was held is never said
        forecast = stream.wait(sequences[0], PATIENT_MS)
        assert forecast.experts[0].tolist() == ranked(Told([], 7, [([3, 1], [0.75, 0.25])]), 1, 4)
        assert stream.wait_union(PATIENT_MS).sequences == tuple(sequences)
        assert talk.book.kinds.count("ask") == 1


def test_no_union_is_waited_for_that_cannot_come(open_stream: Any) -> None:
    with ToyStream(Behaviour(mute=True)) as server:
        stream = connected(open_stream, server, union=True)
        sequence = stream.open()
        tell_token(stream, sequence)
        assert stream.wait_union(60_000) is None


def test_a_union_is_of_all_sequences_while_they_are_within_the_same_tokens(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server, union=True, per_sequence=False)
        sequences = [stream.open(), stream.open()]
        stream.start(sequences, [7, 8])
        stream.route(sequences, LAYER * 2)
        union = stream.wait_union(PATIENT_MS)
        assert (union.sequences, union.seen, union.experts.shape) == (tuple(sequences), 1, (3, 4))
        assert stream.latest_union().seen == 1
        stream.end(sequences[:1])
        assert stream.latest_union() is None


def test_a_model_that_uses_neither_ids_nor_gates_is_told_none(open_stream: Any) -> None:
    with ToyStream(Behaviour(uses_token_ids=False, uses_gates=False)) as server:
        stream = connected(open_stream, server)
        sequence = stream.open(context=[FINISHED])
        stream.start([sequence], [7])
        stream.route([sequence], LAYER, GATES)
        forecast = stream.wait(sequence, PATIENT_MS)
    bare = [(-1, [(experts, [1.0, 1.0]) for experts, _ in PAST[0][1]])]
    assert forecast.experts[0].tolist() == ranked(Told(bare, -1, [([3, 1], [1.0, 1.0])]), 1, 4)


def test_history_is_bounded(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server, history=2)
        stream.open(context=[Token(np.tile([1, 2], (LAYERS, 1)), token_id=token) for token in range(5)])
        talk = server.connections[0]
        until(lambda: "context" in talk.book.kinds)
        (told,) = talk.book.sequences.values()
    assert [token for token, _ in told.past] == [3, 4]


def test_a_long_past_is_told_in_messages_that_the_service_takes(open_stream: Any) -> None:
    with ToyStream(Behaviour(max_frame_bytes=256, max_context_tokens=9)) as server:
        stream = connected(open_stream, server)
        sequence = stream.open(context=[FINISHED] * 20)
        stream.start([sequence], [7])
        forecast = stream.wait(sequence, PATIENT_MS)
        assert server.connections[0].book.kinds.count("context") == 2
    assert forecast.experts[0].tolist() == ranked(Told(PAST * 9, 7), 0, 4)


def test_closed_sequences_are_closed_on_the_service(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequences = [stream.open() for _ in range(40)]
        stream.close_sequences(sequences[1:])
        talk = server.connections[0]
        until(lambda: "close" in talk.book.kinds)
        assert len(talk.book.sequences) == 1
        with pytest.raises(RequestInvalid, match=f"Sequence {sequences[1]} is not open"):
            stream.latest(sequences[1])


def test_a_row_is_used_again_without_a_trace_of_its_earlier_sequence(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        first = stream.open()
        stream.start([first], [7])
        stream.route([first], LAYER, GATES)
        stream.close_sequences([first])
        second = stream.open()
        assert second != first
        stream.start([second], [8])
        forecast = stream.wait(second, PATIENT_MS)
    assert forecast.experts[0].tolist() == ranked(Told(token_id=8), 0, 4)


def test_the_service_hears_that_a_stream_ends(open_stream: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        stream.close()
        until(server.connections[0].over.is_set)
        assert server.connections[0].closed_with == 1000
        assert stream.status.state == "closed"


WRONG_OPTIONS = {
    "no model": {"model": ""},
    "two sizes": {"top_n": 3, "coverage": 0.9},
    "adapt without coverage": {"adapt": True},
    "no forecasts": {"per_sequence": False},
    "coverage of one": {"coverage": 1.0},
    "no time": {"deadline_ms": 0},
    "top_n of none": {"top_n": 0},
    "ahead below 0": {"ahead": -1},
    "every beyond 16 bits": {"every": 70_000},
    "history below 0": {"history": -1},
}


@pytest.mark.parametrize("options", WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_wrong_options_are_raised_at_once(open_stream: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        open_stream(**options)
    assert caught.value.remedy


@pytest.mark.parametrize("base_url", ["127.0.0.1:8080", "https://127.0.0.1", "ftp://x", "http://"])
def test_a_base_url_that_is_none_is_raised_at_once(open_stream: Any, base_url: str) -> None:
    with pytest.raises(ClientError, match="base_url"):
        open_stream(base_url)


NAN = float("nan")
WRONG_USE = {
    "unknown sequence": lambda stream, a, b: stream.start([99], [1]),
    "no sequence": lambda stream, a, b: stream.start([], []),
    "sequence twice": lambda stream, a, b: stream.route([a, a], LAYER * 2),
    "unknown to latest": lambda stream, a, b: stream.latest(99),
    "unknown to wait": lambda stream, a, b: stream.wait(99),
    "union that was not wanted": lambda stream, a, b: stream.wait_union(),
    "start within a token": lambda stream, a, b: stream.start([a], [1]),
    "too few token ids": lambda stream, a, b: stream.start([b], []),
    "fractional token id": lambda stream, a, b: stream.start([b], [1.5]),
    "token id below -1": lambda stream, a, b: stream.start([b], [-2]),
    "route without a token": lambda stream, a, b: stream.route([b], LAYER),
    "ask without a token": lambda stream, a, b: stream.ask([b]),
    "end without a token": lambda stream, a, b: stream.end([b]),
    "different layers": lambda stream, a, b: (stream.start([b], [1]), stream.route([a, b], LAYER * 2)),
    "too many layers": lambda stream, a, b: stream.route([a], [LAYER * LAYERS]),
    "too few experts": lambda stream, a, b: stream.route([a], [[1]]),
    "flat experts": lambda stream, a, b: stream.route([a], [1, 2]),
    "rows of others": lambda stream, a, b: stream.route([a], LAYER * 2),
    "fractional experts": lambda stream, a, b: stream.route([a], [[1.0, 2.0]]),
    "expert out of range": lambda stream, a, b: stream.route([a], [[1, 8]]),
    "expert that would wrap": lambda stream, a, b: stream.route([a], [[1, 256]]),
    "expert below 0": lambda stream, a, b: stream.route([a], [[1, -1]]),
    "expert twice": lambda stream, a, b: stream.route([a], [[1, 1]]),
    "gates of another shape": lambda stream, a, b: stream.route([a], LAYER, [[1.0]]),
    "gates that are no numbers": lambda stream, a, b: stream.route([a], LAYER, [[1.0, NAN]]),
    "gates below 0": lambda stream, a, b: stream.route([a], LAYER, [[1.0, -0.5]]),
    "gates of nothing": lambda stream, a, b: stream.route([a], LAYER, [[0, 0]]),
    "gates beyond measure": lambda stream, a, b: stream.route([a], LAYER, [[1, 1e31]]),
    "unfinished context": lambda stream, a, b: stream.open(context=[Token(LAYER)]),
}


@pytest.mark.parametrize("use", WRONG_USE.values(), ids=WRONG_USE.keys())
def test_wrong_use_is_raised_at_once_and_changes_nothing(open_stream: Any, use: Any) -> None:
    with ToyStream() as server:
        stream = connected(open_stream, server)
        a, b = stream.open(), stream.open()
        stream.start([a], [7])
        stream.route([a], LAYER, GATES)
        with pytest.raises(RequestInvalid) as caught:
            use(stream, a, b)
        stream.route([a], LAYER, GATES)
        forecast = stream.wait(a, PATIENT_MS)
        assert server.connections[0].book.refused == []
    assert caught.value.remedy
    assert forecast.experts[0].tolist() == ranked(Told(token_id=7, layers=[([3, 1], [0.75, 0.25])] * 2), 2, 4)


def test_wrong_routing_of_a_large_batch_is_raised_too(open_stream: Any) -> None:
    sound = np.tile(LAYER, (40, 1))
    with ToyStream() as server:
        stream = connected(open_stream, server)
        sequences = [stream.open() for _ in range(40)]
        stream.start(sequences)
        for row, slot, value in ((7, 0, 8), (7, 0, -1), (7, 0, 1)):
            wrong = sound.copy()
            wrong[row, slot] = value
            with pytest.raises(RequestInvalid, match="experts has an id"):
                stream.route(sequences, wrong)
        for value in (NAN, -1, 1e31, float("inf")):
            gates = np.ones((40, TOP_K))
            gates[7, 0] = value
            with pytest.raises(RequestInvalid, match="gates has a weight"):
                stream.route(sequences, sound, gates)
        stream.route(sequences, sound, np.ones((40, TOP_K)))
        assert stream.wait(sequences[39], PATIENT_MS).seen == 1


def test_more_routing_than_the_service_takes_is_raised(open_stream: Any) -> None:
    with ToyStream(Behaviour(max_frame_bytes=256)) as server:
        stream = connected(open_stream, server)
        sequences = [stream.open() for _ in range(20)]
        stream.start(sequences)
        with pytest.raises(RequestInvalid, match="the service takes 256"):
            stream.route(sequences, LAYER * 20)


def test_a_stream_in_one_thread_needs_no_event_loop() -> None:
    with ToyStream() as server, Stream(server.url, model="toy") as stream:
        assert stream.ready()
