"""What the load says on a stream, read by the service's own decoder; what it reads, in any pieces."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.stream.binary import decode
from service.stream.messages import Hello, Kind, Message, Named, Routing, Start
from specmoe.bench import stream_frames
from specmoe.bench.flow import Flow, opening, turns
from specmoe.bench.model_time import INPUTS
from specmoe.bench.routing import made_up
from specmoe.bench.stream_frames import FORECAST, Answer, answers, masked
from tests.toy_version import TOY_SPEC
from traces.spec import RoutingSpec

FLOW = Flow("toy", 2, TOY_SPEC.num_layers, TOY_SPEC.num_experts, TOY_SPEC.top_k, sequences=3)


def unmasked(frames: bytes) -> list[bytes]:
    """Messages of a client's frames, by RFC 6455 section 5.2, a byte at a time."""
    messages = []
    while frames:
        assert frames[0] == 0x82, "a whole binary message"
        assert frames[1] & 0x80, "a client's frame is masked"
        size, frames = frames[1] & 0x7F, frames[2:]
        if size >= 126:
            width = 2 if size == 126 else 8
            size, frames = int.from_bytes(frames[:width], "big"), frames[width:]
        mask, coded, frames = frames[:4], frames[4 : 4 + size], frames[4 + size :]
        messages.append(bytes(byte ^ mask[place % 4] for place, byte in enumerate(coded)))
    return messages


def understood(frames: bytes, spec: RoutingSpec | None = TOY_SPEC) -> list[Message]:
    """As the service takes it."""
    return [decode(message, spec) for message in unmasked(frames)]


def served(kind: int, count: int, first_layer: int, body: bytes = b"") -> bytes:
    """A service's message in a frame."""
    message = struct.pack("<BBHIHHI", kind, 0, count, 0, first_layer, 0, 0) + body
    size = (
        struct.pack("!BBH", 0x82, 126, len(message))
        if len(message) > 125
        else b"\x82" + bytes([len(message)])
    )
    return size + message


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_a_frame_holds_its_message(size: int) -> None:
    message = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    assert unmasked(masked(message)) == [message]


def test_hello_asks_for_a_forecast_at_every_layer() -> None:
    (hello,) = understood(masked(stream_frames.hello("toy", 2)))
    assert hello == Hello(tag=0, model="toy", version=2, at_start=True, every=1)


@pytest.mark.parametrize("num_experts", [8, 300], ids=["one byte an expert", "two"])
def test_routing_says_what_the_arrays_say(num_experts: int) -> None:
    spec = RoutingSpec("wide", 4, num_experts, 2)
    token = made_up(spec, batch=3, seen=4, seed=1)
    frame = stream_frames.routing([5, 6, 7], 1, token.experts[:, 1:3], token.gates[:, 1:3], num_experts)
    (routing,) = understood(masked(frame), spec)
    assert isinstance(routing, Routing)
    assert (routing.sequences, routing.first_layer) == ([5, 6, 7], 1)
    np.testing.assert_array_equal(routing.experts, token.experts[:, 1:3])
    np.testing.assert_array_equal(routing.gates, token.gates[:, 1:3])


def test_a_token_has_as_many_turns_as_layers_and_tells_every_layer_once() -> None:
    told = turns(FLOW)
    assert len(told) == INPUTS * FLOW.num_layers
    for first in range(0, len(told), FLOW.num_layers):
        last, start = understood(told[first])
        layers = [understood(turn) for turn in told[first + 1 : first + FLOW.num_layers]]
        assert isinstance(start, Start)
        assert isinstance(last, Routing)
        assert last.first_layer == FLOW.num_layers - 1
        assert [[routing.first_layer for routing in turn] for turn in layers] == [[0], [1], [2]]


def test_the_turns_of_any_token_go_on_where_its_opening_ends() -> None:
    hello, known, start, routing = understood(opening(FLOW, 2))
    assert isinstance(hello, Hello)
    assert known == Named(Kind.OPEN, 0, [0, 1, 2])
    assert isinstance(start, Start)
    assert isinstance(routing, Routing)
    assert (routing.first_layer, routing.experts.shape[1]) == (0, FLOW.num_layers - 1)
    after = understood(turns(FLOW)[2 * FLOW.num_layers])[0]
    assert isinstance(after, Routing)
    token = made_up(TOY_SPEC, batch=3, seen=FLOW.num_layers, seed=1)
    np.testing.assert_array_equal(after.experts[:, 0], token.experts[:, -1])


@given(cut=st.integers(0, 400))
def test_answers_may_come_in_pieces(cut: int) -> None:
    whole = served(FORECAST, 3, 1, bytes(300)) + b"\x89\x00" + served(FORECAST, 3, 2)
    received = bytearray(whole[:cut])
    came = list(answers(received))
    received += whole[cut:]
    came += answers(received)
    assert came == [Answer(FORECAST, 3, 1, bytes(300)), Answer(FORECAST, 3, 2, b"")]
    assert not received


def test_a_closing_service_gives_its_reason() -> None:
    frame = b"\x88\x08" + struct.pack("!H", 4404) + b"reason"
    assert list(answers(bytearray(frame))) == [Answer(stream_frames.ERROR, 0, 0, b"reason")]
