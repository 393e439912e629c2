"""docs/stream-protocol.md says what is so: its worked examples, its tables of kinds and of close codes.

.venv/bin/python -m pytest tests/service/stream/test_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from service.stream import connection, host
from service.stream.binary import Binary, decode
from service.stream.messages import Kind, Ranking, Welcome
from service.stream.text import parse
from tests.service.stream.frames import Message, binary, read, text
from tests.service.stream.test_text import plain
from traces.spec import RoutingSpec

PAGE = (Path(__file__).parents[3] / "docs" / "stream-protocol.md").read_text(encoding="utf-8")
SPEC = RoutingSpec("gpt-oss-20b", 24, 32, 4)
LINE = re.compile(r"^ *(\d+)  ((?:[0-9a-f]{2} )*[0-9a-f]{2}) ", re.MULTILINE)


def example(kind: str) -> list[tuple[int, bytes]]:
    """The lines of a worked example: offset and bytes."""
    block = PAGE.split(f"\n**{kind}** ", 1)[1].split("```text\n", 1)[1].split("```")[0]
    return [(int(offset), bytes.fromhex(dumped)) for offset, dumped in LINE.findall(block)]


def dumped(kind: str) -> bytes:
    return b"".join(part for _, part in example(kind))


@pytest.mark.parametrize("kind", ["hello", "welcome", "open", "start", "routing", "forecast"])
def test_offsets_are_those_of_the_bytes(kind: str) -> None:
    lines = example(kind)
    ends = np.cumsum([len(part) for _, part in lines]).tolist()
    assert [offset for offset, _ in lines] == [0, *ends[:-1]]


SENT: list[Message] = [
    {"type": "hello", "tag": 1, "model": "gpt-oss-20b", "top_n": 8},
    {"type": "open", "tag": 2, "sequences": [7]},
    {"type": "start", "tag": 3, "sequences": [7], "token_ids": [976]},
    {
        "type": "routing",
        "tag": 5,
        "sequences": [7],
        "first_layer": 0,
        "experts": [[[3, 17, 8, 30]]],
        "gates": [[[0.5, 0.25, 0.125, 0.125]]],
    },
]


@pytest.mark.parametrize("message", SENT, ids=lambda message: message["type"])
def test_messages_of_a_client_are_what_is_read(message: Message) -> None:
    assert dumped(message["type"]).hex(" ") == binary(message).hex(" ")
    assert plain(decode(dumped(message["type"]), SPEC)) == plain(parse(text(message), SPEC))


def test_the_welcome_is_what_is_written() -> None:
    told = Welcome(1, "gpt-oss-20b", 1, 24, 32, 4, True, True, 16384, 1 << 20, 4096, 300)
    assert dumped("welcome").hex(" ") == Binary().welcome(told).hex(" ")


def test_the_forecast_is_what_is_written_and_read() -> None:
    experts = np.array(
        [[[4, 19, 11, 2, 7], [11, 2, 30, 5, 16]], [[19, 4, 2, 23, 8], [5, 11, 2, 28, 9]]],
    )
    probabilities = np.array(
        [
            [[0.9375, 0.875, 0.75, 0.5, 0.25], [0.875, 0.75, 0.75, 0.5, 0.375]],
            [[0.875, 0.875, 0.625, 0.5, 0.125], [0.9375, 0.75, 0.625, 0.5, 0.25]],
        ]
    )
    told = Ranking(5, 22, 3, [7, 9], [0, 4], experts, probabilities, np.array([[4, 5], [4, 4]]))
    assert dumped("forecast").hex(" ") == Binary(32).forecast(told).hex(" ")
    of_seven = [
        {
            "layer": 22,
            "distance": 1,
            "experts": [4, 19, 11, 2],
            "probabilities": [0.9375, 0.875, 0.75, 0.5],
        },
        {
            "layer": 23,
            "distance": 2,
            "experts": [11, 2, 30, 5, 16],
            "probabilities": [0.875, 0.75, 0.75, 0.5, 0.375],
        },
    ]
    of_nine = [
        {
            "layer": 22,
            "distance": 1,
            "experts": [19, 4, 2, 23],
            "probabilities": [0.875, 0.875, 0.625, 0.5],
        },
        {
            "layer": 23,
            "distance": 2,
            "experts": [5, 11, 2, 28],
            "probabilities": [0.9375, 0.75, 0.625, 0.5],
        },
    ]
    assert read(dumped("forecast"), num_experts=32) == {
        "type": "forecast",
        "tag": 5,
        "first_layer": 22,
        "dropped": 3,
        "predictions": [
            {"sequence": 7, "token": 0, "layers": of_seven},
            {"sequence": 9, "token": 4, "layers": of_nine},
        ],
    }


def test_the_tables_name_every_kind_of_message() -> None:
    told = {int(number): name for number, name in re.findall(r"^\| (\d+) \| ([a-z]+) \|", PAGE, re.MULTILINE)}
    assert told == {kind.value: kind.label for kind in Kind}


def test_the_table_of_close_codes_has_every_code() -> None:
    told = {int(code) for code in re.findall(r"^\| ([14]\d{3}) \|", PAGE, re.MULTILINE)}
    of_frames = {1002, 1009}  # sent by the WebSocket library
    ours = {connection.NORMAL, connection.INTERNAL_ERROR, connection.UNREADABLE, host.GOING_AWAY}
    assert told == of_frames | ours | set(connection.CLOSE_CODES.values())
