"""Binary frames are what docs/stream-protocol.md says, byte by byte; whatever is not is refused by name.

.venv/bin/python -m pytest tests/service/stream/test_binary.py
"""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.errors import MessageUnreadable
from service.stream.binary import Binary, decode
from service.stream.messages import Context, Hello, Kind, Message, Named, Ranking, Routing, Start, Welcome
from tests.service.stream.frames import binary, frame
from tests.service.stream.messages import after_hello, hello
from tests.toy_version import TOY_SPEC
from traces.spec import RoutingSpec

WIDE = RoutingSpec("wide", 2, 300, 1)


def plain(message: Message) -> list[Any]:
    """A message's fields, arrays as lists."""
    fields = [getattr(message, name) for name in message.__slots__]
    return [field.tolist() if isinstance(field, np.ndarray) else field for field in fields]


def test_hello_is_read_field_by_field() -> None:
    message = bytes.fromhex(
        "01 0e 0000 07000000 0300 0200 01000000"  # union, at_start, adapt; tag 7, every 3, ahead 2; protocol
        "88130000 6666663f 0000 0300 0200 0000"  # 5000 µs, coverage 0.9, 3 and 2 bytes
        "746f79 3132"
    )
    assert decode(message, None) == Hello(
        tag=7,
        model="toy",
        version=12,
        per_sequence=False,
        union=True,
        top_n=None,
        coverage=0.9,
        adapt=True,
        ahead=2,
        at_start=True,
        every=3,
        deadline_us=5000,
    )


@pytest.mark.parametrize(
    ("version", "expected"),
    [("", None), ("3", 3), ("production", "production")],
    ids=["none", "number", "alias"],
)
def test_a_version_is_a_number_or_an_alias(version: str, expected: object) -> None:
    message = decode(binary({"type": "hello", "model": "toy", "version": version}), None)
    assert isinstance(message, Hello) and message.version == expected


@pytest.mark.parametrize("kind", [Kind.OPEN, Kind.END, Kind.ASK, Kind.CLOSE], ids=lambda kind: kind.label)
def test_messages_of_nothing_but_sequences_are_read(kind: Kind) -> None:
    message = bytes([kind]) + bytes.fromhex("00 0200 09000000 0000 0000 00000000 05000000 ffffffff")
    assert decode(message, TOY_SPEC) == Named(kind, 9, [5, 2**32 - 1])


def test_start_is_read() -> None:
    with_ids = bytes.fromhex("04 01 0200 01000000 0000 0000 00000000 05000000 06000000 d0030000 ffffffff")
    without = bytes.fromhex("04 00 0200 01000000 0000 0000 00000000 05000000 06000000")
    assert plain(decode(with_ids, TOY_SPEC)) == plain(Start(1, [5, 6], np.array([976, -1])))
    assert plain(decode(without, TOY_SPEC)) == plain(Start(1, [5, 6], np.array([-1, -1])))


def test_routing_is_read() -> None:
    message = bytes.fromhex(
        "05 02 0100 01000000 0100 0200 00000000 05000000"  # gates; 1 sequence, layers 1 and 2
        "0000803f 0000003f 00000040 0000803e"  # 1, 0.5, 2, 0.25
        "03 04 07 00"
    )
    expected = Routing(1, [5], 1, np.array([[[3, 4], [7, 0]]]), np.array([[[1, 0.5], [2, 0.25]]]))
    assert plain(decode(message, TOY_SPEC)) == plain(expected)


def test_ids_of_many_experts_take_two_bytes() -> None:
    message = bytes.fromhex("05 00 0100 01000000 0000 0200 00000000 05000000 2b01 0100")
    assert plain(decode(message, WIDE)) == plain(Routing(1, [5], 0, np.array([[[299], [1]]]), None))


def test_context_is_read() -> None:
    message = bytes.fromhex(
        "03 01 0100 01000000 0000 0200 02000000 05000000"  # token ids; 2 layers, 2 tokens
        "d0030000 ffffffff 0100 0200 0300 0400"
    )
    expected = Context(1, 5, np.array([976, -1]), np.array([[[1], [2]], [[3], [4]]]), None)
    assert plain(decode(message, WIDE)) == plain(expected)


def test_arrays_are_read_where_they_lie() -> None:
    message = {
        "type": "routing",
        "sequences": [5],
        "first_layer": 0,
        "experts": [[[3, 4]]],
        "gates": [[[1, 2]]],
    }
    frame = binary(message)
    decoded = decode(frame, TOY_SPEC)
    assert isinstance(decoded, Routing) and decoded.gates is not None
    whole = np.frombuffer(frame, np.uint8)
    assert np.shares_memory(decoded.experts, whole) and np.shares_memory(decoded.gates, whole)


@given(st.binary(max_size=120))
@example(frame(1, extra=1, body=struct.pack("<IfHHHH", 0, 0, 0, 3, 65000, 0) + b"toy" + b"9" * 65000))
def test_any_bytes_are_a_message_or_unreadable(message: bytes) -> None:
    for spec in (None, TOY_SPEC, WIDE):
        try:
            decode(message, spec)
        except MessageUnreadable as error:
            assert error.message and error.remedy


@given(
    st.sampled_from(sorted(Kind)),
    st.integers(0, 7),
    st.binary(min_size=14, max_size=14),
    st.binary(max_size=60),
)
def test_any_header_is_a_message_or_unreadable(kind: int, flags: int, header: bytes, body: bytes) -> None:
    for spec in (TOY_SPEC, WIDE):
        try:
            decode(bytes([kind, flags]) + header + body, spec)
        except MessageUnreadable as error:
            assert error.message


@given(hello() | after_hello, st.data())
def test_a_message_cut_short_or_drawn_out_is_unreadable(message: dict[str, Any], data: st.DataObject) -> None:
    whole = binary(message)
    shorter = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for wrong in (shorter, whole + b"\0"):
        with pytest.raises(MessageUnreadable, match=r"bytes, expected"):
            decode(wrong, TOY_SPEC)


HUGE = 65535
MALFORMED = {
    "nothing": (b"", "A message has 0 bytes, expected a header of 16"),
    "unknown kind": (frame(9, count=1), "kind is 9, expected 1 to 8."),
    "a kind of the service": (frame(129, count=1), "kind is 129, expected 1 to 8."),
    "no sequence": (frame(2), "open names no sequence: count is 0."),
    "unknown flag": (frame(2, flags=1, count=1, body=bytes(4)), "open has flags 1, expected bits of 0 only."),
    "flag of another kind": (
        frame(4, flags=2, count=1, body=bytes(8)),
        "start has flags 2, expected bits of 1",
    ),
    "unknown flag of routing": (frame(5, flags=1, count=1, layers=1, body=bytes(10)), "routing has flags 1"),
    "unknown flag of context": (frame(3, flags=4, count=1, layers=4, extra=1), "context has flags 4"),
    "first_layer of open": (
        frame(2, count=1, first_layer=1, body=bytes(4)),
        "open has (1, 0, 0) behind its tag",
    ),
    "layers of start": (frame(4, count=1, layers=1, body=bytes(4)), "start has (0, 1, 0) behind its tag"),
    "extra of close": (frame(8, count=1, extra=1, body=bytes(4)), "close has (0, 0, 1) behind its tag"),
    "extra of routing": (
        frame(5, count=1, layers=1, extra=1),
        "routing tells 1 layers with extra 1, expected",
    ),
    "routing of no layer": (frame(5, count=1, body=bytes(4)), "routing tells 0 layers"),
    "first_layer of context": (
        frame(3, count=1, first_layer=1, layers=4, extra=1, body=bytes(12)),
        "context has (1,) behind its tag",
    ),
    "context of two": (frame(3, count=2, layers=4, extra=1), "context tells 2 sequences, 4 layers, 1 tokens"),
    "context of some layers": (frame(3, count=1, layers=3, extra=1), "context tells 1 sequences, 3 layers"),
    "context of no token": (frame(3, count=1, layers=4), "context tells 1 sequences, 4 layers, 0 tokens"),
    "a header of more than there is": (
        frame(5, flags=2, count=HUGE, layers=HUGE, body=bytes(4)),
        f"routing has 20 bytes, expected {16 + 4 * HUGE + 5 * HUGE * HUGE * 2} by its header.",
    ),
    "a context of more than there is": (
        frame(3, flags=3, count=1, layers=4, extra=2**32 - 1),
        f"context has 16 bytes, expected {20 + (2**32 - 1) * (4 + 8 * 5)} by its header.",
    ),
}
HELLO = struct.Struct("<IfHHHH")
MALFORMED_HELLO = {
    "another protocol": (frame(1, extra=2), "hello speaks protocol 2, expected 1."),
    "unknown flag": (frame(1, flags=16, extra=1), "hello has flags 16, expected bits of 15 only."),
    "no body": (frame(1, extra=1), "hello has 16 bytes, expected 32 and the model's name."),
    "sequences": (
        frame(1, count=1, extra=1, body=HELLO.pack(0, 0, 0, 0, 0, 0)),
        "hello has a field that must",
    ),
    "zero not zero": (
        frame(1, extra=1, body=HELLO.pack(0, 0, 0, 0, 0, 1)),
        "hello has a field that must be 0",
    ),
    "a longer name": (
        frame(1, extra=1, body=HELLO.pack(0, 0, 0, 4, 0, 0) + b"toy"),
        "hello has 35 bytes, expected 36",
    ),
    "not UTF-8": (
        frame(1, extra=1, body=HELLO.pack(0, 0, 0, 2, 0, 0) + b"\xff\xfe"),
        "hello's model or version is",
    ),
    "half a character each": (
        frame(1, extra=1, body=HELLO.pack(0, 0, 0, 1, 1, 0) + "ü".encode()),
        "hello's model or version is not UTF-8.",
    ),
    "open first": (frame(2, count=1, body=bytes(4)), "open came before hello."),
}


@pytest.mark.parametrize(
    ("message", "reason", "spec"),
    [
        pytest.param(*case, spec, id=name)
        for cases, spec in ((MALFORMED, TOY_SPEC), (MALFORMED_HELLO, None))
        for name, case in cases.items()
    ],
)
def test_a_malformed_message_is_refused_by_name(
    message: bytes, reason: str, spec: RoutingSpec | None
) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MessageUnreadable) as refused:
            decode(message, spec)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.message.startswith(reason)
    assert most < 100_000  # whatever a header claims, nothing of that size was made


WELCOME = Welcome(
    tag=7,
    model="toy",
    version=2,
    num_layers=4,
    num_experts=8,
    top_k=2,
    uses_token_ids=True,
    uses_gates=False,
    max_sequences=16384,
    max_frame_bytes=1 << 20,
    max_context_tokens=4096,
    idle_seconds=300,
)
RANKING = Ranking(
    tag=9,
    first_layer=2,
    dropped=2**32 + 3,
    sequences=[5, 6],
    tokens=[0, 1],
    experts=np.array([[[3, 4], [1, 0]], [[7, 6], [5, 4]]]),
    probabilities=np.array([[[1, 0.5], [0.5, 0.25]], [[1, 1], [0, 0]]], np.float32),
    sizes=np.array([[2, 1], [1, 2]]),
)
UNION = Ranking(*astuple(RANKING)[:5], RANKING.experts[0], RANKING.probabilities[0], RANKING.sizes[0])
ONE, HALF, QUARTER, NONE = "0000803f", "0000003f", "0000803e", "00000000"
ANSWERS = {
    "welcome": (
        Binary().welcome(WELCOME),
        "80 01 0000 07000000 0000 0000 02000000 0400 0800 0200 0100 00400000 00001000 00100000 2c010000",
    ),
    "forecast": (
        Binary(8).forecast(RANKING),
        "81 00 0200 09000000 0200 0200 03000000 05000000 06000000 00000000 01000000"
        f"{ONE}{HALF} {HALF}{QUARTER} {ONE}{ONE} {NONE}{NONE} 0200 0100 0100 0200 0304 0100 0706 0504",
    ),
    "forecast, many experts": (
        Binary(300).forecast(RANKING),
        "81 00 0200 09000000 0200 0200 03000000 05000000 06000000 00000000 01000000"
        f"{ONE}{HALF} {HALF}{QUARTER} {ONE}{ONE} {NONE}{NONE} 0200 0100 0100 0200"
        "03000400 01000000 07000600 05000400",
    ),
    "union": (
        Binary(8).union(UNION),
        "82 00 0200 09000000 0200 0200 03000000 05000000 06000000 00000000 01000000"
        f"{ONE}{HALF} {HALF}{QUARTER} 0200 0100 0304 0100",
    ),
    "error": (
        Binary(8).error(9, "c", "m", "r", fatal=True),
        "83 01 0000 09000000 0000 0000 27000000" + b'{"code":"c","message":"m","remedy":"r"}'.hex(),
    ),
    "goodbye": (Binary(8).goodbye(10000), "84 00 0000 00000000 0000 0000 10270000"),
    "expired": (Binary(8).expired([5, 6]), "85 00 0200 00000000 0000 0000 00000000 05000000 06000000"),
}


@pytest.mark.parametrize(("written", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
def test_answers_are_written_as_the_page_says(written: bytes, expected: str) -> None:
    assert written.hex(" ") == bytes.fromhex(expected).hex(" ")
