"""A conversation as the page tells it, in this process: real versions, a real hub, no socket.

.venv/bin/python -m pytest tests/service/stream/test_conversation.py
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.stream import connection, host
from service.stream.scoring import MOST_LEARNED, MOST_TOKENS
from speculation.adaptive_coverage import AdaptiveCoverage
from speculation.live import LiveScores
from speculation.sequence import Sequence
from tests.service.stream.conversing import SPECULATOR, Service, Talk, conversing
from tests.service.stream.frames import Message, binary, frame
from tests.speculation.replayed import Replayed
from tests.speculation.toy_routing import routed
from tests.toy_version import TOY_SPEC

pytestmark = pytest.mark.anyio

LAYERS, K = TOY_SPEC.num_layers, TOY_SPEC.top_k
# Of one sequence: layer l of it is ROUTED[:, l : l + 1].
ROUTED = np.array([[[0, 1], [2, 3], [4, 5], [6, 7]]])


def layers(first: int, end: int, sequences: int = 1) -> list[Any]:
    return ROUTED[:, first:end].repeat(sequences, 0).tolist()


@pytest.fixture
async def service(shared_store: Path) -> AsyncIterator[Service]:
    async with conversing(shared_store) as service:
        yield service


async def told(talk: Talk, first: int, end: int, *names: int) -> list[Message]:
    """Tell these layers; the forecasts that come."""
    experts = layers(first, end, len(names))
    return await talk.forecasts("routing", sequences=list(names), first_layer=first, experts=experts)


async def begun(service: Service, *names: int, **hello: Any) -> Talk:
    """A talk in which a token of these sequences has begun."""
    talk = await service.talk(**hello)
    talk.say("open", sequences=list(names))
    talk.say("start", sequences=list(names))
    await talk.settled()
    return talk


@pytest.mark.parametrize("in_text", [False, True], ids=["binary", "text"])
async def test_a_decode_loop_is_forecast_layer_by_layer(service: Service, in_text: bool) -> None:
    talk = await service.talk(in_text=in_text, top_n=3)
    talk.say("open", sequences=[7])
    sequence = Sequence(SPECULATOR)
    token_ids, experts, gates = routed(1, 2, TOY_SPEC, seen=LAYERS)
    for token in range(2):
        sequence.start_token(int(token_ids[token]))
        (forecast,) = await talk.forecasts("start", sequences=[7], token_ids=[int(token_ids[token])])
        for layer in range(LAYERS):
            assert (forecast["first_layer"], forecast["predictions"][0]["token"]) == (layer, token)
            for came, expected in zip(
                forecast["predictions"][0]["layers"], sequence.forecast(top_n=3), strict=True
            ):
                assert (came["layer"], came["distance"]) == (expected.layer, expected.distance)
                assert came["experts"] == expected.experts.tolist()
                assert came["probabilities"] == pytest.approx(expected.probabilities.tolist(), abs=1e-5)
            sequence.observe(experts[token, layer], gates[token, layer])
            told = await talk.forecasts(
                "routing",
                sequences=[7],
                first_layer=layer,
                experts=experts[token, None, None, layer].tolist(),
                gates=gates[token, None, None, layer].tolist(),
            )
            assert len(told) == (layer < LAYERS - 1)
            forecast = told[0] if told else forecast


async def test_welcome_tells_shape_version_and_limits(shared_store: Path) -> None:
    async with conversing(
        shared_store, max_stream_sequences=9, max_frame_bytes=2048, stream_idle_seconds=7
    ) as s:
        talk = s.connect()
        talk.say("hello", model="toy", version=1, tag=5)
        (welcome,) = await talk.settled()
    assert welcome == {
        "type": "welcome",
        "tag": 5,
        "version": 1,
        "protocol": 1,
        "num_layers": 4,
        "num_experts": 8,
        "top_k": 2,
        "uses_token_ids": True,
        "uses_gates": True,
        "max_sequences": 9,
        "max_frame_bytes": 2048,
        "max_context_tokens": 4096,
        "idle_seconds": 7,
    }


@pytest.mark.parametrize("version", [1, 2, "production", None])
async def test_hello_chooses_the_version(service: Service, version: object) -> None:
    talk = service.connect(in_text=True)
    talk.say("hello", model="toy", version=version)
    (welcome,) = await talk.settled()
    assert welcome["version"] == (1 if version == 1 else 2)


@pytest.mark.parametrize(
    ("every", "steps", "after"),
    [
        (1, [1, 1, 1, 1], [1, 2, 3]),
        (2, [1, 1, 1, 1], [2]),
        (3, [1, 1, 1, 1], [3]),
        (4, [1, 1, 1, 1], []),
        (0, [1, 1, 1, 1], []),
        (2, [1, 2, 1], [3]),
        (2, [3, 1], [3]),
        (1, [4], []),
    ],
)
async def test_a_forecast_comes_after_every_so_many_layers(
    service: Service, every: int, steps: list[int], after: list[int]
) -> None:
    talk = await begun(service, 7, every=every)
    seen, came = 0, []
    for step in steps:
        came += [answer["first_layer"] for answer in await told(talk, seen, seen + step, 7)]
        seen += step
    assert came == after


@pytest.mark.parametrize("at_start", [True, False])
async def test_a_start_is_forecast_where_hello_asks_for_it(service: Service, at_start: bool) -> None:
    talk = await service.talk(at_start=at_start, every=0)
    talk.say("open", sequences=[7])
    assert len(await talk.forecasts("start", sequences=[7])) == at_start


async def test_ask_is_answered_for_each_layer_that_its_sequences_are_at(service: Service) -> None:
    talk = await begun(service, 1, 2, 3, every=0)
    await told(talk, 0, 2, 2)
    forecasts = await talk.forecasts("ask", sequences=[1, 2, 3], tag=9)
    came = [(f["tag"], f["first_layer"], [p["sequence"] for p in f["predictions"]]) for f in forecasts]
    assert came == [(9, 0, [1, 3]), (9, 2, [2])]


@pytest.mark.parametrize(("ahead", "expected"), [(0, [1, 2, 3]), (1, [1]), (2, [1, 2]), (9, [1, 2, 3])])
async def test_a_forecast_reaches_as_far_ahead_as_hello_asks(
    service: Service, ahead: int, expected: list[int]
) -> None:
    talk = await begun(service, 7, ahead=ahead)
    (forecast,) = await told(talk, 0, 1, 7)
    assert [layer["layer"] for layer in forecast["predictions"][0]["layers"]] == expected


async def test_forecasts_and_union_come_together(service: Service) -> None:
    talk = await service.talk(union=True, top_n=8)
    talk.say("open", sequences=[1, 2])
    forecast, union = await talk.forecasts("start", sequences=[1, 2], token_ids=[5, 9])
    chances = np.zeros((2, 8))
    for row, prediction in enumerate(forecast["predictions"]):
        chances[row, prediction["layers"][0]["experts"]] = prediction["layers"][0]["probabilities"]
    demand = 1 - np.prod(1 - chances, axis=0)
    assert (union["sequences"], union["tokens"]) == ([1, 2], [0, 0])
    assert union["layers"][0]["experts"] == np.argsort(-demand).tolist()
    assert union["layers"][0]["probabilities"] == pytest.approx(
        sorted(demand.tolist(), reverse=True), abs=1e-6
    )


async def test_coverage_lists_as_many_experts_as_its_table_says(service: Service) -> None:
    talk = await begun(service, 7, coverage=0.95)
    (forecast,) = await told(talk, 0, 1, 7)
    sequence = Sequence(SPECULATOR)
    sequence.start_token()
    sequence.observe(ROUTED[0, 0])
    listed = [len(layer["experts"]) for layer in forecast["predictions"][0]["layers"]]
    assert listed == [len(layer.experts) for layer in sequence.forecast(coverage=0.95)]


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_sets_that_adapt_learn_from_each_finished_token_of_their_own_stream(
    shared_store: Path, share: float
) -> None:
    expected, published = AdaptiveCoverage(SPECULATOR, levels=(0.9,)), SPECULATOR.coverage_sets(0.9)
    sequence, grown = Replayed(SPECULATOR), []
    async with conversing(shared_store, stream_score_share=share) as service:
        talk = await service.talk(coverage=0.9, adapt=True)
        talk.say("open", sequences=[7])
        for _ in range(12):
            sequence.start(-1)
            # Those that it expects least: its sets are too small.
            experts = np.argsort(sequence.probabilities(), axis=-1)[:, :K]
            forecasts, asked = [], ("start", {})
            for seen in range(LAYERS):
                kind, fields = asked
                (forecast,) = await talk.forecasts(kind, sequences=[7], **fields)
                forecasts.append((seen, probabilities := sequence.probabilities()))
                sizes = expected.sizes(probabilities, seen)[0, seen:]
                listed = forecast["predictions"][0]["layers"]
                assert [len(layer["experts"]) for layer in listed] == sizes.tolist()
                grown.append(int((sizes - published.sizes(probabilities, seen)[seen:]).sum()))
                now = experts[None, seen : seen + 1]
                asked = "routing", {"first_layer": seen, "experts": now.tolist()}
                sequence.tell(now[0])
            await talk.forecasts("routing", sequences=[7], **asked[1])
            await asyncio.sleep(0.01)
            expected.observe(forecasts, experts)
        others = [await begun(service, 7, coverage=0.9, adapt=adapt) for adapt in (True, False)]
        ((one,), (other,)) = [await told(talk, 0, 1, 7) for talk in others]
        (version,) = (await service.client.get("/v1/models/toy/live")).json()["versions"]
    assert one["predictions"] == other["predictions"]
    assert not any(grown[:LAYERS]) and any(grown[-LAYERS:])
    assert version["tokens"] == 12 * share


async def test_many_adapting_sequences_leave_room_for_those_that_are_scored(shared_store: Path) -> None:
    many = list(range(200))
    async with conversing(shared_store, stream_score_share=0.0) as service:
        talk = await begun(service, *many, coverage=0.9, adapt=True)
        hub = service.streams.hubs("toy")[0]
        assert len(hub._scoring._followed) == MOST_LEARNED < MOST_TOKENS
        talk.say("close", sequences=many)
        assert not hub._scoring._followed


async def test_context_is_taken_in_before_the_forecast_that_follows_it(service: Service) -> None:
    token_ids, experts, gates = routed(3, 40, TOY_SPEC, seen=LAYERS)
    talk, sequence = await service.talk(top_n=8), Replayed(SPECULATOR)
    talk.say("open", sequences=[1, 2])
    for part in (slice(0, 25), slice(25, 40)):
        past = {"token_ids": token_ids[part].tolist(), "experts": experts[part].tolist()}
        talk.say("context", sequence=1, gates=gates[part].tolist(), **past)
    for token_id, routing, weights in zip(token_ids, experts, gates, strict=True):
        sequence.start(int(token_id))
        sequence.tell(routing, weights)
    sequence.start(5)
    (forecast,) = await talk.forecasts("start", sequences=[1, 2], token_ids=[5, 5])
    expected = -np.sort(-sequence.probabilities()[0])
    came = [prediction["layers"][0]["probabilities"] for prediction in forecast["predictions"]]
    assert came[0] == pytest.approx(expected.tolist(), abs=1e-5)
    assert came[1] != pytest.approx(expected.tolist(), abs=1e-2)


async def test_a_token_that_ends_before_its_last_layer_is_forgotten(service: Service) -> None:
    talk = await begun(service, 1, top_n=8)
    await told(talk, 0, 3, 1)
    talk.say("end", sequences=[1])
    talk.say("open", sequences=[2])
    (forecast,) = await talk.forecasts("start", sequences=[1, 2], token_ids=[5, 5])
    one, other = forecast["predictions"]
    assert (one["token"], other["token"]) == (1, 0)
    assert one["layers"] == other["layers"]


async def test_what_was_overtaken_is_counted_and_only_the_newest_is_sent(service: Service) -> None:
    talk = await service.talk()
    talk.say("open", sequences=[1, 2])
    talk.say("start", sequences=[1, 2], tag=1)
    talk.say("routing", sequences=[1], first_layer=0, experts=layers(0, 1), tag=2)
    talk.say("routing", sequences=[1], first_layer=1, experts=layers(1, 2), tag=3)
    forecasts = await talk.settled()
    came = [(f["tag"], f["first_layer"], [p["sequence"] for p in f["predictions"]]) for f in forecasts]
    assert came == [(1, 0, [2]), (3, 2, [1])]
    assert {forecast["dropped"] for forecast in forecasts} == {2}
    assert await service.metric('specmoe_stream_dropped_forecasts_total{model="toy",version="2"}') >= 2


async def test_routing_that_makes_nothing_due_brings_a_forecast_up_to_date(service: Service) -> None:
    talk = await service.talk(every=2)
    talk.say("open", sequences=[1])
    talk.say("start", sequences=[1], tag=5)
    (forecast,) = await told(talk, 0, 1, 1)
    assert (forecast["tag"], forecast["first_layer"], forecast["dropped"]) == (5, 1, 0)
    (forecast,) = await told(talk, 1, 2, 1)
    assert (forecast["first_layer"], forecast["dropped"]) == (2, 0)


async def test_nothing_is_sent_while_the_client_does_not_read_and_then_the_newest(service: Service) -> None:
    talk, other = await begun(service, 7), await begun(service, 7)
    talk.congest()
    for layer in range(3):
        assert await told(talk, layer, layer + 1, 7) == []
        assert len(await told(other, layer, layer + 1, 7)) == 1
    talk.relieve()
    (forecast,) = await talk.settled()
    assert (forecast["first_layer"], forecast["dropped"]) == (3, 2)


async def test_who_sends_nonsense_and_does_not_read_is_not_talked_to_any_longer(service: Service) -> None:
    talk = await begun(service, 7)
    talk.congest()
    talk.say("close", sequences=[8])
    assert talk.wire.closed == (4429, "messages are not read")
    assert (await talk.settled(), service.in_use) == ([], 0)


async def test_a_forecast_that_would_come_too_late_is_dropped(service: Service) -> None:
    talk = await service.talk(deadline_us=1)
    talk.say("open", sequences=[7])
    assert await talk.forecasts("start", sequences=[7]) == []
    assert talk.connection.conversation is not None and talk.connection.conversation.dropped == 1


async def test_forecasts_come_again_after_one_that_took_long(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = await service.talk(deadline_us=20_000)
    (hub,) = service.streams.hubs("toy")
    forecast = hub.slots.forecast

    def slow(rows: Any) -> Any:
        time.sleep(0.5)
        return forecast(rows)

    monkeypatch.setattr(hub.slots, "forecast", slow)
    talk.say("open", sequences=[7])
    assert len(await talk.forecasts("start", sequences=[7])) == 1
    monkeypatch.setattr(hub.slots, "forecast", forecast)
    came = [await talk.forecasts("ask", sequences=[7]) for _ in range(30)]
    assert came[0] == [] and len(came[-1]) == 1


async def test_messages_that_come_while_the_version_is_loaded_wait(service: Service) -> None:
    talk = service.connect()
    talk.say("hello", model="toy", version=1)
    talk.say("open", sequences=[7])
    talk.say("start", sequences=[7])
    assert [answer["type"] for answer in await talk.settled()] == ["welcome", "forecast"]


async def test_too_many_bytes_before_welcome_end_the_connection(service: Service) -> None:
    talk = service.connect()
    talk.say("hello", model="toy", version=1)
    for _ in range(2):
        talk.connection.receive(bytes(connection.MAX_WAITING_BYTES // 2 + 1))
    (error,) = await talk.settled()
    assert "came before welcome" in error["message"] and error["fatal"]


async def test_too_many_messages_before_welcome_end_the_connection(service: Service) -> None:
    talk = service.connect()
    talk.say("hello", model="toy", version=1)
    for number in range(connection.MAX_WAITING + 1):
        talk.say("open", sequences=[number])
    (error,) = await talk.settled()
    assert error["message"].startswith("More than 64 messages") and error["fatal"]
    assert talk.wire.closed is not None and talk.wire.closed[0] == 4400
    assert service.in_use == 0


REFUSED_HELLOS = {
    "another model": ({"model": "other"}, 4404, "model_not_found"),
    "no such version": ({"version": 9}, 4404, "version_not_found"),
    "a version of many digits": ({"version": "9" * 5000}, 4400, "invalid_request"),
    "a version that is a path": ({"version": "../2"}, 4400, "invalid_request"),
    "no such alias": ({"version": "candidate"}, 4404, "version_not_found"),
    "nothing asked for": ({"per_sequence": False}, 4400, "invalid_message"),
    "top_n and coverage": ({"top_n": 2, "coverage": 0.9}, 4400, "invalid_message"),
    "adapt without coverage": ({"adapt": True}, 4400, "invalid_message"),
    "top_n beyond the experts": ({"top_n": 9}, 4400, "invalid_message"),
    "coverage above 1": ({"coverage": 1.5}, 4400, "invalid_message"),
    "coverage no number": ({"coverage": float("nan")}, 4400, "invalid_message"),
    "coverage infinite": ({"coverage": float("inf")}, 4400, "invalid_message"),
    "coverage beyond the table": ({"coverage": 0.999}, 4400, "invalid_request"),
    "another protocol": ({"protocol": 2}, 4400, "unreadable_message"),
}


@pytest.mark.parametrize(("fields", "close", "code"), REFUSED_HELLOS.values(), ids=REFUSED_HELLOS.keys())
async def test_a_refused_hello_ends_the_connection(
    service: Service, fields: Message, close: int, code: str
) -> None:
    talk = service.connect()
    error = await talk.error("hello", **({"model": "toy", "tag": 5} | fields))
    assert (error["code"], error["fatal"], error["tag"]) == (code, True, 5)
    assert talk.wire.closed == (close, error["message"][:120])


async def test_an_unready_model_is_told_as_such(tmp_path: Path, shared_store: Path) -> None:
    async with conversing(shared_store) as service:
        service.streams._serving.find("toy").running = None
        talk = service.connect()
        error = await talk.error("hello", model="toy")
    assert error["code"] == "not_ready" and talk.wire.closed is not None and talk.wire.closed[0] == 4503


UNREADABLE: dict[str, bytes | str] = {
    "hello twice": binary({"type": "hello", "model": "toy", "tag": 5}),
    "unknown kind": frame(9, tag=5),
    "no JSON": "{",
    "short": b"\x02",
}


@pytest.mark.parametrize("message", UNREADABLE.values(), ids=UNREADABLE.keys())
async def test_what_cannot_be_understood_ends_the_connection(service: Service, message: bytes | str) -> None:
    talk = await begun(service, 7)
    talk.connection.receive(message)
    (error,) = talk.heard()
    assert (error["code"], error["fatal"]) == ("unreadable_message", True)
    assert talk.wire.closed is not None and talk.wire.closed[0] == 4400
    talk.say("start", sequences=[7])  # nobody listens any longer
    assert (await talk.settled(), service.in_use) == ([], 0)


async def test_an_error_before_hello_is_told_in_the_encoding_of_the_message(service: Service) -> None:
    for in_text in (False, True):
        talk = service.connect(in_text=in_text)
        talk.say("open", sequences=[7], tag=5)
        assert isinstance(talk.wire.sent[0], str) == in_text
        (error,) = talk.heard()
        assert (error["message"], error["tag"]) == ("open came before hello.", 5)


async def test_both_encodings_are_taken_and_the_answer_is_in_that_of_hello(service: Service) -> None:
    talk = await service.talk(in_text=True)
    talk.connection.receive(binary({"type": "open", "sequences": [7]}))
    talk.connection.receive(binary({"type": "start", "sequences": [7]}))
    await asyncio.sleep(0.01)
    assert [type(answer) for answer in talk.wire.sent] == [str]


async def test_a_refused_message_is_refused_whole(service: Service) -> None:
    talk = await begun(service, 1, 2, every=0)
    error = await talk.error("open", sequences=[3, 1])
    assert error["message"] == "sequences[1] is 1, which is open already."
    error = await talk.error("start", sequences=[3])
    assert error["message"] == "sequences[0] is 3, which is not open."
    wrong = [*layers(0, 1), [[8, 1]]]
    error = await talk.error("routing", sequences=[1, 2], first_layer=0, experts=wrong, tag=5)
    assert (error["message"], error["tag"]) == ("experts[1][0][0] is 8, expected 0 to 7.", 5)
    (forecast,) = await talk.forecasts("ask", sequences=[1, 2])
    assert forecast["first_layer"] == 0


async def test_a_gate_of_1e30_is_a_gate(service: Service) -> None:
    talk = await begun(service, 7)
    told = {"sequences": [7], "first_layer": 0, "experts": [[[0, 1]]], "gates": [[[1e30, 1.0]]]}
    assert len(await talk.forecasts("routing", **told)) == 1


async def test_more_sequences_than_there_is_room_for_are_refused(shared_store: Path) -> None:
    async with conversing(shared_store, max_stream_sequences=3) as service:
        one, other = await begun(service, 1, 2), await service.talk()
        error = await other.error("open", sequences=[1, 2])
        assert (error["code"], error["fatal"]) == ("too_many_sequences", False)
        assert service.in_use == 2
        one.leave()
        other.say("open", sequences=[1, 2, 3])
        assert (await other.settled(), service.in_use) == ([], 3)


async def test_more_context_than_may_wait_is_refused(shared_store: Path) -> None:
    async with conversing(shared_store, max_context_tokens=3) as service:
        talk = await service.talk()
        talk.say("open", sequences=[1, 2])
        past = {"experts": ROUTED.repeat(2, 0).tolist()}
        talk.say("context", sequence=1, **past)
        talk.say("context", sequence=2, **past)
        error = await talk.error("context", sequence=1, tag=5, **past)
        assert (error["code"], error["tag"], error["fatal"]) == ("context_too_long", 5, False)
        talk.say("context", sequence=1, **past)
        assert await talk.settled() == []


async def test_a_history_that_still_waits_goes_with_its_sequence(service: Service) -> None:
    talk = await service.talk(top_n=8)
    talk.say("open", sequences=[1, 2])
    talk.say("context", sequence=1, experts=ROUTED.repeat(3, 0).tolist())
    talk.say("close", sequences=[1])
    talk.say("open", sequences=[1])
    (forecast,) = await talk.forecasts("start", sequences=[1, 2], token_ids=[5, 5])
    one, other = forecast["predictions"]
    assert one["layers"] == other["layers"]


async def test_sequences_that_are_not_mentioned_expire_and_the_client_hears_of_it(shared_store: Path) -> None:
    async with conversing(shared_store, stream_idle_seconds=1) as service:
        talk = await begun(service, 1, 2)
        (hub,) = service.streams.hubs("toy")
        hub._used_at[:] -= 0.9
        talk.say("ask", sequences=[2])
        await talk.settled()
        hub._used_at[:] -= 0.9
        hub.expire()
        assert talk.heard() == [{"type": "expired", "sequences": [1]}]
        assert (await talk.error("ask", sequences=[1]))["message"].endswith("which is not open.")
        async with asyncio.timeout(5):  # the service looks by itself, too
            while not (heard := talk.heard()):
                await asyncio.sleep(0.02)
        assert heard == [{"type": "expired", "sequences": [2]}]


async def test_more_sequences_expire_than_fit_a_message(shared_store: Path) -> None:
    async with conversing(shared_store, max_stream_sequences=70_000) as service:
        talk = await service.talk()
        for first in (0, 35_000):
            talk.say("open", sequences=list(range(first, first + 35_000)))
        (hub,) = service.streams.hubs("toy")
        hub._used_at[:] = -1e9
        hub.expire()
        expired = talk.heard()
        assert [len(message["sequences"]) for message in expired] == [65_535, 4_465]
        assert service.in_use == 0


async def test_who_expires_and_does_not_read_takes_nobody_along(
    shared_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with conversing(shared_store, stream_idle_seconds=1, extra_versions=0) as service:
        old, new = await begun(service, 7, version=1), await begun(service, 7)
        old.congest()
        async with asyncio.timeout(5):
            while not (heard := new.heard()):
                await asyncio.sleep(0.02)
        assert heard == [{"type": "expired", "sequences": [7]}]
        assert old.wire.closed is not None and old.wire.closed[0] == 4429
    assert [record for record in caplog.records if record.exc_info] == []


async def test_leaving_frees_every_row_and_versions_that_are_served_no_longer(shared_store: Path) -> None:
    async with conversing(shared_store, extra_versions=0) as service:
        old, new = await begun(service, 1, 2, version=1), await begun(service, 1)
        assert [hub.running.version for hub in service.streams.hubs("toy")] == [2, 1]
        assert await service.metric("specmoe_stream_sequences") == 3
        old.leave()
        assert [hub.running.version for hub in service.streams.hubs("toy")] == [2]
        new.leave()
        assert [hub.running.version for hub in service.streams.hubs("toy")] == [2]
        assert (service.in_use, await service.metric("specmoe_streams")) == (0, 0)


async def test_a_client_that_leaves_amid_a_forecast_disturbs_nobody(service: Service) -> None:
    talk, other = await begun(service, 7), await begun(service, 7)
    for one in (talk, other):
        one.say("ask", sequences=[7])
    talk.leave()
    assert len(await other.settled()) == 1
    assert talk.wire.sent == []


async def test_streams_of_a_version_share_model_calls(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks = [await begun(service, 1, 2) for _ in range(3)]
    (hub,) = service.streams.hubs("toy")
    calls, forecast = [], hub.slots.forecast
    monkeypatch.setattr(hub.slots, "forecast", lambda rows: calls.append(len(rows)) or forecast(rows))
    for talk in talks:
        talk.say("ask", sequences=[1, 2])
    for talk in talks:
        assert len(await talk.settled()) == 1
    assert calls == [6]


async def test_a_model_that_fails_ends_the_streams_and_says_so(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    talk = await begun(service, 7)
    (hub,) = service.streams.hubs("toy")

    def fails(rows: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(hub.slots, "forecast", fails)
    error = await talk.error("ask", sequences=[7])
    assert (error["code"], error["fatal"], service.in_use) == ("internal", True, 0)
    assert talk.wire.closed is not None and talk.wire.closed[0] == 1011
    assert "no memory" in caplog.text and "no memory" not in error["message"]
    monkeypatch.undo()
    again = await begun(service, 7)
    assert len(await again.forecasts("ask", sequences=[7])) == 1


async def test_who_says_no_hello_in_time_is_sent_away(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "HELLO_SECONDS", 0.05)
    talk, silent = await service.talk(), service.connect()
    await asyncio.sleep(0.1)
    assert silent.wire.closed == (4408, "No hello came within 0.05 s.")
    assert talk.wire.closed is None


async def test_more_connections_than_allowed_are_told_so(shared_store: Path) -> None:
    async with conversing(shared_store, max_streams=1) as service:
        await service.talk()
        one_too_many = service.connect()
        (error,) = one_too_many.heard()
        assert (error["code"], error["fatal"]) == ("too_many_streams", True)
        assert one_too_many.wire.closed == (4429, "1 streams are open, and no more are allowed.")
        assert await service.metric("specmoe_streams") == 1


async def test_a_drain_says_goodbye_waits_and_hangs_up(service: Service) -> None:
    leaves, stays = await begun(service, 7), await begun(service, 7)
    drain = asyncio.create_task(service.streams.drain(0.2))
    await asyncio.sleep(0.01)
    assert leaves.heard() == stays.heard() == [{"type": "goodbye", "milliseconds": 200}]
    assert len(await stays.forecasts("ask", sequences=[7])) == 1
    leaves.leave()
    late = service.connect()
    assert late.wire.closed is not None and "stopping" in late.wire.closed[1]
    await drain
    assert (leaves.wire.closed, stays.wire.closed) == (None, (1001, "the service stopped"))


async def test_a_drain_ends_with_the_last_stream(service: Service) -> None:
    talk = await begun(service, 7)
    drain = asyncio.create_task(service.streams.drain(600))
    await asyncio.sleep(0.01)
    talk.leave()
    await asyncio.wait_for(drain, 5)


async def test_forecasts_are_scored_as_a_replay_would_score_them(shared_store: Path) -> None:
    rng = np.random.default_rng(5)
    expected = LiveScores(TOY_SPEC, {})
    async with conversing(shared_store, stream_score_share=1.0) as service:
        talk = await service.talk()
        talk.say("open", sequences=[1, 2])
        sequences = {1: Replayed(SPECULATOR), 2: Replayed(SPECULATOR)}
        for seed in rng.integers(0, 2**32, 5).tolist():
            token_ids, experts, gates = routed(seed, 2, TOY_SPEC, seen=LAYERS)
            await talk.forecasts("start", sequences=[1, 2], token_ids=token_ids.tolist())
            forecasts: dict[int, list[Any]] = {1: [], 2: []}
            for (name, sequence), token_id in zip(sequences.items(), token_ids.tolist(), strict=True):
                sequence.start(token_id)
                forecasts[name].append((0, sequence.probabilities()))
            for layer in range(LAYERS):
                now = slice(layer, layer + 1)
                told = {"experts": experts[:, now].tolist(), "gates": gates[:, now].tolist()}
                await talk.forecasts("routing", sequences=[1, 2], first_layer=layer, **told)
                for row, (name, sequence) in enumerate(sequences.items()):
                    sequence.tell(experts[row, now], gates[row, now])
                    if layer < LAYERS - 1:
                        forecasts[name].append((layer + 1, sequence.probabilities()))
            for row, name in enumerate(sequences):
                expected.add(forecasts[name], experts[row])
        await asyncio.sleep(0.05)
        report = (await service.client.get("/v1/models/toy/live")).json()
    (version,) = report["versions"]
    assert (version["version"], version["tokens"], version["forecasts"]) == (2, 10, 10 * LAYERS)
    assert version["validation"] == {"start": {"recall_at_k": 0.5}, "1": {"recall_at_k": 0.6}}
    for distance, scores in expected.report().items():
        came = version["distances"][distance]
        assert set(came.pop("coverage")) == {"0.9", "0.95", "0.99"}
        scores.pop("coverage")
        assert came == pytest.approx(scores, abs=1e-5)


async def test_a_forecast_that_is_asked_for_again_is_scored_once(shared_store: Path) -> None:
    async with conversing(shared_store, stream_score_share=1.0) as service:
        talk = await begun(service, 7)
        for layer in range(LAYERS):
            await talk.forecasts("ask", sequences=[7])
            await told(talk, layer, layer + 1, 7)
        await asyncio.sleep(0.01)
        (version,) = (await service.client.get("/v1/models/toy/live")).json()["versions"]
    assert (version["tokens"], version["forecasts"]) == (1, LAYERS)


async def test_tokens_that_never_ended_do_not_keep_others_from_being_scored(shared_store: Path) -> None:
    many = list(range(200))
    async with conversing(shared_store, stream_score_share=1.0) as service:
        talk = await begun(service, *many)
        talk.say("close", sequences=many)
        talk.say("open", sequences=[7])
        await talk.forecasts("start", sequences=[7])
        await told(talk, 0, LAYERS, 7)
        await asyncio.sleep(0.01)
        (version,) = (await service.client.get("/v1/models/toy/live")).json()["versions"]
    assert version["tokens"] == 1


async def test_nothing_is_scored_where_the_share_is_0(shared_store: Path) -> None:
    async with conversing(shared_store, stream_score_share=0.0) as service:
        talk = await begun(service, 7)
        await told(talk, 0, LAYERS, 7)
        (version,) = (await service.client.get("/v1/models/toy/live")).json()["versions"]
    assert (version["tokens"], version["distances"]) == (0, {})


async def test_a_model_that_no_stream_used_has_an_empty_report(service: Service) -> None:
    assert (await service.client.get("/v1/models/toy/live")).json() == {"model": "toy", "versions": []}
    assert (await service.client.get("/v1/models/other/live")).status_code == 404


async def test_messages_and_forecasts_are_counted(service: Service) -> None:
    labels = '{model="toy",version="2"}'
    talk = await begun(service, 1, 2)
    await talk.error("close", sequences=[9])
    await told(talk, 0, 1, 1)
    assert await service.metric('specmoe_stream_messages_total{outcome="ok"}') == 4
    assert await service.metric('specmoe_stream_messages_total{outcome="invalid_message"}') == 1
    assert await service.metric(f"specmoe_stream_forecasts_total{labels}") == 3
    assert await service.metric("specmoe_streams") == 1
