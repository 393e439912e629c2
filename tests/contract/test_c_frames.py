"""The C client's reading, fed by hypothesis, with sanitizers on; the websockets package is the reference.

.venv/bin/python -m pytest tests/contract/test_c_frames.py
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from tests.contract.c_client import compiled

MOST_MESSAGE_BYTES = 1024
HEADER = struct.Struct("<BBHIHHI")
Read = Callable[[bytes, int], list[str]]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    """What the C client makes of bytes that come so many at a time, a line each."""
    program = compiled("frames.c", tmp_path_factory.mktemp("c"))
    process = subprocess.Popen(
        [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def lines(data: bytes, step: int) -> list[str]:
        process.stdin.write(struct.pack("<II", len(data), step) + data)
        process.stdin.flush()
        told: list[str] = []
        while (line := process.stdout.readline().decode().rstrip("\n")) != "over":
            assert process.poll() is None or line, process.communicate()[1].decode()
            told.append(line)
        return told

    yield lines
    _, complaints = process.communicate()
    assert (process.returncode, complaints) == (0, b"")


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """As a service writes it."""
    length = len(payload)
    size = bytes([length]) if length < 126 else b"\x7e" + struct.pack(">H", length)
    return bytes([final << 7 | opcode]) + size + payload


def expected(data: bytes) -> tuple[list[str], bool]:
    """(messages and control frames, whether it went wrong then), as the websockets package reads them."""
    protocol = ClientProtocol(parse_uri("ws://service/"), state=State.OPEN, max_size=MOST_MESSAGE_BYTES)
    protocol.receive_data(data)
    told: list[str] = []
    kind, message = 0, b""
    for event in protocol.events_received():
        assert isinstance(event, Frame)
        if event.opcode in (Opcode.TEXT, Opcode.BINARY):
            kind, message = event.opcode, b""
        if event.opcode in (Opcode.CONT, Opcode.TEXT, Opcode.BINARY):
            message += event.data
            if event.fin:
                told.append(f"{kind:d} {message.hex()}")
        else:
            told.append(f"{event.opcode:d} {bytes(event.data).hex()}")
    return told, protocol.parser_exc is not None


def up_to_close(lines: list[str]) -> list[str]:
    """What follows a close is nobody's business, and what is in it is judged elsewhere."""
    closes = [number for number, line in enumerate(lines) if line.startswith("8 ")]
    return lines[: closes[0]] if closes else lines


payloads = st.one_of(st.binary(max_size=40), st.binary(min_size=120, max_size=400))
control = st.builds(frame, st.sampled_from([9, 10]), st.binary(max_size=125))


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message, in fragments or not, with control frames between them."""
    parts = draw(st.lists(payloads, min_size=1, max_size=3))
    written = b""
    for number, part in enumerate(parts):
        opcode = 0 if number else draw(st.sampled_from([1, 2]))
        written += frame(opcode, part, final=number == len(parts) - 1) + draw(
            st.one_of(st.just(b""), control)
        )
    return written


@st.composite
def forecasts(draw: st.DrawFn) -> bytes:
    """A message of the service that is nearly right: for 4 layers and 8 experts, sequences 0 and 1."""
    kind = draw(st.sampled_from([129, 129, 129, 129, 131, 132, 133, 128, 7]))
    count, layers = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    first, width = draw(st.integers(0, 2)), draw(st.integers(0, 5))
    numbers = draw(st.lists(st.integers(0, 4), min_size=2 * count, max_size=2 * count))
    slots = count * layers * width
    shares = draw(st.lists(st.floats(0, 1, width=32), min_size=slots, max_size=slots))
    rows = count * layers
    sizes = draw(st.lists(st.integers(0, width + 1), min_size=rows, max_size=rows))
    experts = draw(st.lists(st.integers(0, 8), min_size=slots, max_size=slots))
    body = struct.pack(f"<{2 * count}I{slots}f{rows}H{slots}B", *numbers, *shares, *sizes, *experts)
    header = HEADER.pack(
        kind, draw(st.integers(0, 1)), count, draw(st.integers(0, 5)), first, layers, len(body)
    )
    return frame(2, header + body)


@st.composite
def damaged(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> bytes:
    """Cut somewhere, with some bytes changed."""
    data = bytearray(draw(source))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


streams = st.lists(st.one_of(messages(), control, forecasts()), max_size=4).map(b"".join)
SETTINGS = settings(max_examples=300, deadline=None)


@SETTINGS
@given(data=st.one_of(st.binary(max_size=300), streams, damaged(streams)), step=st.integers(1, 40))
def test_frames_are_read_as_the_reference_reads_them(read: Read, data: bytes, step: int) -> None:
    # One judges a frame at its first bytes, the other at its last ones: let there be an end to each.
    data += bytes(2 * MOST_MESSAGE_BYTES)
    lines = [line for line in read(data, step) if not line.startswith(("stream", "forecast"))]
    wrong = bool(lines) and lines[-1].startswith("broken")
    ours = lines[:-1] if wrong else lines
    theirs, wrong_there = expected(data)
    assert up_to_close(ours) == up_to_close(theirs)
    if up_to_close(ours) == ours:
        assert wrong == wrong_there


@SETTINGS
@given(data=st.one_of(st.binary(max_size=300), streams, damaged(streams)), step=st.integers(1, 40))
def test_it_makes_no_difference_in_how_many_pieces_bytes_come(read: Read, data: bytes, step: int) -> None:
    assert read(data, step) == read(data, len(data) + 1)


@SETTINGS
@given(data=st.one_of(forecasts(), damaged(forecasts())))
def test_a_message_is_taken_whole_or_ends_the_stream_with_a_reason(read: Read, data: bytes) -> None:
    told = read(data, 1 << 16)
    outcome = next(line for line in told if line.startswith("stream"))
    assert outcome == "stream 0" or outcome.startswith("stream -3 The ")
    if not outcome.startswith("stream 0"):
        assert not [line for line in told if line.startswith("forecast")]


def test_a_proper_forecast_is_read(read: Read) -> None:
    """That the others do not only look at refusals."""
    shares = 0.5, 0.25, 0.5, 0.25, 1, 0, 0.75, 0.125
    body = struct.pack("<4I8f4H8B", 0, 1, 0, 0, *shares, 2, 1, 0, 2, 1, 2, 3, 4, 5, 6, 7, 0)
    message = HEADER.pack(129, 0, 2, 1, 0, 2, 0) + body
    told = read(frame(2, message), 7)[1:]
    assert told == [
        "stream 0",
        "forecast 0 0 of 2 1: 1:0.5 2:0.25 3:0.5 4:0.25",
        "forecast 1 0 of 0 2: 5:1 6:0 7:0.75 0:0.125",
    ]
