"""JSON messages mean what binary ones mean; whatever is none is refused by its field.

.venv/bin/python -m pytest tests/service/stream/test_text.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import MessageInvalid, MessageUnreadable
from service.stream.binary import Binary, decode
from service.stream.messages import Hello, Message, Ranking, Welcome
from service.stream.text import Text, parse
from tests.service.stream.frames import KINDS, binary, read, text
from tests.service.stream.messages import any_message
from tests.toy_version import TOY_SPEC
from traces.spec import RoutingSpec

PAGE = (Path(__file__).parents[3] / "docs" / "stream-protocol.md").read_text(encoding="utf-8")
HELLO = {"type": "hello", "model": "toy"}
ROUTING = {"type": "routing", "sequences": [7], "first_layer": 0, "experts": [[[3, 4]]]}
CONTEXT = {"type": "context", "sequence": 7, "experts": [[[0, 1]] * 4]}
START = {"type": "start", "sequences": [7]}


def plain(message: Message) -> dict[str, Any]:
    """A message's fields, arrays as lists."""
    fields = {name: getattr(message, name) for name in message.__slots__}
    return {
        name: field.tolist() if isinstance(field, np.ndarray) else field for name, field in fields.items()
    }


@settings(deadline=None)
@given(any_message)
def test_the_same_message_is_the_same_in_both_encodings(message: dict[str, Any]) -> None:
    from_text, from_binary = parse(text(message), TOY_SPEC), decode(binary(message), TOY_SPEC)
    assert type(from_text) is type(from_binary)
    assert plain(from_text) == plain(from_binary)


def test_hello_needs_the_model_only() -> None:
    assert parse('{"type": "hello", "model": "toy"}', None) == Hello(tag=0, model="toy")


UNREADABLE = {
    "nothing": ("", "The message is not JSON"),
    "not JSON": ("{", "The message is not JSON"),
    "a list": ("[]", "The message is a list of 0, expected an object."),
    "null": ("null", "The message is null, expected an object."),
    "nested without end": ("[" * 5000, "The message is not JSON"),
    "no type": ("{}", "type is missing."),
    "another type": ('{"type": "shut"}', "type is shut, expected 'hello', 'open', 'end', 'ask', 'close'"),
    "a type of the service": ('{"type": "forecast"}', "type is forecast, expected 'hello'"),
    "a number as type": ('{"type": 5}', "type is 5, expected"),
    "half a character as type": ('{"type": "\\ud800"}', "The message is not JSON"),
}


@pytest.mark.parametrize(("message", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_is_no_message_is_unreadable(message: str, reason: str) -> None:
    with pytest.raises(MessageUnreadable) as refused:
        parse(message, TOY_SPEC)
    assert refused.value.message.startswith(reason)


def test_a_message_before_hello_is_unreadable() -> None:
    with pytest.raises(MessageUnreadable, match="open came before hello"):
        parse('{"type": "open", "sequences": [1]}', None)


INVALID = {
    "no model": ({"type": "hello"}, "hello.model is missing."),
    "model too long": (HELLO | {"model": "m" * 101}, "hello.model is 'mmm"),
    "unknown field": (HELLO | {"topn": 3}, "hello.topn is not a field of it."),
    "version zero": (HELLO | {"version": 0}, "hello.version is 0, expected a version number"),
    "coverage one": (HELLO | {"coverage": 1}, "hello.coverage is 1, expected less than 1"),
    "top_n zero": (HELLO | {"top_n": 0}, "hello.top_n is 0, expected greater than"),
    "every negative": (HELLO | {"every": -1}, "hello.every is -1, expected greater than"),
    "deadline a float": (HELLO | {"deadline_us": 0.5}, "hello.deadline_us is 0.5, expected a valid integer"),
    "tag too large": (HELLO | {"tag": 2**32}, "hello.tag is 4294967296, expected less than"),
    "no sequences": ({"type": "open"}, "open.sequences is missing."),
    "sequences empty": (START | {"sequences": []}, "start.sequences is a list of 0, expected list should"),
    "sequence negative": (START | {"sequences": [1, -1]}, "start.sequences[1] is -1, expected greater than"),
    "sequence too large": (START | {"sequences": [2**32]}, "start.sequences[0] is 4294967296, expected less"),
    "fewer token ids": (START | {"token_ids": []}, "token_ids has 0 entries, expected 1."),
    "token id too large": (START | {"token_ids": [2**31]}, "start.token_ids[0] is 2147483648, expected less"),
    "token id too small": (START | {"token_ids": [-2]}, "start.token_ids[0] is -2, expected greater than"),
    "expert negative": (ROUTING | {"experts": [[[0, -1]]]}, "routing.experts[0][0][1] is -1, expected"),
    "no experts": (ROUTING | {"experts": []}, "routing.experts is a list of 0, expected list should"),
    "experts flat": (ROUTING | {"experts": [[3, 4]]}, "routing.experts[0][0] is 3, expected a valid arr"),
    "no layer": (ROUTING | {"experts": [[]]}, "experts[0] has 0 layers, expected 1."),
    "too few slots": (ROUTING | {"experts": [[[3]]]}, "experts[0][0] has 1 entries, expected top_k = 2."),
    "rows of two": (ROUTING | {"experts": [[[3, 4]]] * 2}, "experts has 2 entries, expected 1."),
    "gates of two": (ROUTING | {"gates": [[[1, 1]]] * 2}, "gates has 2 entries, expected 1."),
    "gates of two layers": (ROUTING | {"gates": [[[1, 1]] * 2]}, "gates[0] has 2 layers, expected 1."),
    "gate negative": (ROUTING | {"gates": [[[1, -1]]]}, "routing.gates[0][0][1] is -1, expected greater"),
    "gate not finite": (ROUTING | {"gates": [[[1, math.nan]]]}, "routing.gates[0][0][1] is not a finite"),
    "sequence not a number": (START | {"sequences": [math.nan]}, "start.sequences[0] is nan, expected a"),
    "gate huge": (ROUTING | {"gates": [[[1, 1e31]]]}, "routing.gates[0][0][1] is 1e+31, expected less than"),
    "context of some layers": (CONTEXT | {"experts": [[[0, 1]]]}, "experts[0] has 1 layers, expected 4."),
    "context of two": (CONTEXT | {"sequence": [7]}, "context.sequence is a list of 1, expected a valid int"),
}  # fmt: skip


@pytest.mark.parametrize(("message", "reason"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_field_is_named(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(MessageInvalid) as refused:
        parse(json.dumps(message), TOY_SPEC)
    assert refused.value.message.startswith(reason)


def test_further_problems_are_counted() -> None:
    with pytest.raises(MessageInvalid, match=r"\(2 more problems.\)"):
        parse(json.dumps(HELLO | {"top_n": 0, "every": -1, "model": 3}), None)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def nearly_right(draw: st.DrawFn) -> dict[str, Any]:
    """A message with something odd in one of its fields."""
    message = dict(draw(any_message))
    field = draw(st.sampled_from(sorted(message)) | st.text(max_size=5))
    message[field] = draw(anything)
    return message


@settings(deadline=None, max_examples=200)
@given(nearly_right() | anything)
def test_any_json_is_a_message_or_refused(message: Any) -> None:
    for spec in (TOY_SPEC, None):
        try:
            parse(json.dumps(message), spec)
        except (MessageInvalid, MessageUnreadable) as error:
            error.message.encode()


@given(st.text(max_size=50))
def test_any_text_is_a_message_or_refused(message: str) -> None:
    with pytest.raises(MessageUnreadable):
        parse(message, None)


def ranking(seed: int, *, union: bool) -> Ranking:
    """Any ranking."""
    rng = np.random.default_rng(seed)
    n, m, width = rng.integers(1, 4, 3).tolist()
    shape = (m, width) if union else (n, m, width)
    sizes = rng.integers(1, width + 1, shape[:-1])
    sizes.flat[-1] = width
    return Ranking(
        tag=int(rng.integers(2**32)),
        first_layer=int(rng.integers(4)),
        dropped=int(rng.integers(2**32)),
        sequences=list(range(n)),
        tokens=rng.integers(0, 2**32, n).tolist(),
        experts=rng.integers(0, 8, shape),
        # The same in float32 and in six decimals.
        probabilities=(rng.integers(0, 65, shape) / 64).astype(np.float32),
        sizes=sizes,
    )


@given(st.integers(0, 2**32 - 1))
def test_the_same_forecast_is_the_same_in_both_encodings(seed: int) -> None:
    for union in (False, True):
        told = ranking(seed, union=union)
        in_text, in_binary = (
            read(encoding.union(told) if union else encoding.forecast(told))
            for encoding in (Text(), Binary(8))
        )
        assert in_text == in_binary


def test_each_sequence_of_a_forecast_has_lists_of_its_own_size() -> None:
    told = Ranking(
        tag=1,
        first_layer=2,
        dropped=0,
        sequences=[5, 6],
        tokens=[0, 0],
        experts=np.array([[[3, 4, 0], [1, 0, 2]], [[7, 6, 5], [5, 4, 3]]]),
        probabilities=np.full((2, 2, 3), 0.5, np.float32),
        sizes=np.array([[1, 3], [2, 0]], np.uint16),
    )
    for encoding in (Text(), Binary(8)):
        predictions = read(encoding.forecast(told))["predictions"]
        listed = [[layer["experts"] for layer in prediction["layers"]] for prediction in predictions]
        assert listed == [[[3], [1, 0, 2]], [[7, 6], []]]


@pytest.mark.parametrize(
    "say",
    [
        lambda encoding: encoding.welcome(
            Welcome(1, "toy", 2, 4, 8, 2, True, False, 16384, 1 << 20, 4096, 300)
        ),
        lambda encoding: encoding.error(9, "code", "message", "remedy", fatal=True),
        lambda encoding: encoding.goodbye(10000),
        lambda encoding: encoding.expired([5, 6]),
    ],
    ids=["welcome", "error", "goodbye", "expired"],
)
def test_other_answers_are_the_same_in_both_encodings(say: Any) -> None:
    assert read(say(Text())) == read(say(Binary())) | ({"model": "toy"} if "toy" in say(Text()) else {})


def examples(place: int) -> list[dict[str, Any]]:
    """The messages that the page shows."""
    block = PAGE.split("```json\n")[place].split("```")[0].replace(', "... L layers"', ", [0, 1, 2, 3]" * 23)
    joined = block.replace("\n ", " ").strip().replace("}\n{", "}\n\n{").split("\n\n")
    return [json.loads(message) for message in joined]


def test_the_messages_of_the_page_are_read() -> None:
    spec = RoutingSpec("gpt-oss-20b", 24, 32, 4)
    assert [message["type"] for message in examples(1)] == list(KINDS)
    for message in examples(1):
        parse(text(message), spec)


def test_the_answers_of_the_page_have_the_fields_that_are_sent() -> None:
    layer = ranking(1, union=True)
    encoding = Text()
    sent = [
        encoding.welcome(Welcome(1, "toy", 2, 4, 8, 2, True, False, 16384, 1 << 20, 4096, 300)),
        encoding.forecast(ranking(1, union=False)),
        encoding.union(layer),
        encoding.error(9, "code", "message", "remedy", fatal=True),
        encoding.goodbye(10000),
        encoding.expired([5, 6]),
    ]
    for shown, told in zip(examples(2), map(read, sent), strict=True):
        assert fields(shown) == fields(told)


def fields(value: Any) -> Any:
    """The names in a message, all the way down."""
    if isinstance(value, list):
        return fields(value[0]) if value else None
    return {name: fields(inner) for name, inner in value.items()} if isinstance(value, dict) else None
