"""Whatever a client says, in whatever order: the service does what the protocol's rules say, and no more.

.venv/bin/python -m pytest tests/service/stream/test_rules.py
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.service.stream.conversing import SPECULATOR, Service, Talk, conversing
from tests.service.stream.frames import Message
from tests.service.stream.messages import routed, weighted
from tests.service.stream.protocol import Protocol
from tests.toy_version import TOY_SPEC

NAMES = [0, 1, 2, 3, 2**32 - 1]
LAYERS = TOY_SPEC.num_layers
FIELDS = re.compile(r"(sequences|first_layer|layers|experts|gates|token_ids)\b")
# None for which the toy's probabilities are all equal: what is best then depends on the last bit.
token_id = st.sampled_from([-1, 7, 20, 976])
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)
tag = st.integers(0, 2**32 - 1)
options = st.fixed_dictionaries(
    {
        "at_start": st.booleans(),
        "every": st.integers(0, LAYERS + 1),
        "ahead": st.integers(0, LAYERS + 1),
    },
    optional={"top_n": st.integers(1, TOY_SPEC.num_experts)},
) | st.fixed_dictionaries({"coverage": st.sampled_from([0.5, 0.9, 0.95, 0.99])})
kinds = st.sampled_from([(True, False), (False, True), (True, True)])


@pytest.fixture(scope="module")
def on_a_loop(shared_store: Path) -> Iterator[tuple[asyncio.AbstractEventLoop, Service]]:
    """One service for all examples, on a loop that runs when told to: hypothesis knows no coroutines."""
    loop = asyncio.new_event_loop()
    stack = contextlib.AsyncExitStack()
    service = loop.run_until_complete(stack.enter_async_context(conversing(shared_store)))
    yield loop, service
    loop.run_until_complete(stack.aclose())
    loop.close()


def test_the_rules_hold_in_any_conversation(
    on_a_loop: tuple[asyncio.AbstractEventLoop, Service],
) -> None:
    loop, service = on_a_loop

    class Conversations(RuleBasedStateMachine):
        talk: Talk
        protocol: Protocol

        @initialize(options=options, kinds=kinds, in_text=st.booleans())
        def greet(self, options: Message, kinds: tuple[bool, bool], in_text: bool) -> None:
            hello = options | {"per_sequence": kinds[0], "union": kinds[1]}
            self.talk = loop.run_until_complete(service.talk(in_text=in_text, **hello))
            self.protocol = Protocol(hello, SPECULATOR)

        @rule(names=names, tag=tag)
        def open(self, names: list[int], tag: int) -> None:
            self.say(type="open", sequences=names, tag=tag)

        @rule(kind=st.sampled_from(["end", "ask", "ask", "close"]), names=names, tag=tag)
        def name(self, kind: str, names: list[int], tag: int) -> None:
            self.say(type=kind, sequences=names, tag=tag)

        @rule(data=st.data(), tag=tag, with_ids=st.booleans())
        def start(self, data: st.DataObject, tag: int, with_ids: bool) -> None:
            names = self.some(data, set(self.protocol.sequences) - self.protocol.in_progress)
            ids = [data.draw(token_id) for _ in names] if with_ids else None
            self.say(type="start", sequences=names, tag=tag, token_ids=ids)

        @rule(data=st.data())
        def context(self, data: st.DataObject) -> None:
            names = self.some(data, set(self.protocol.sequences) - self.protocol.in_progress)
            tokens = data.draw(st.integers(1, 3))
            self.say(
                type="context",
                sequence=names[0],
                token_ids=[data.draw(token_id) for _ in range(tokens)],
                experts=data.draw(routed(tokens, LAYERS)),
                gates=data.draw(weighted(tokens, LAYERS)),
            )

        @rule(
            data=st.data(),
            tag=tag,
            layers=st.integers(1, LAYERS),
            odd=st.sampled_from([*"....", "id", "gate"]),
        )
        def routing(self, data: st.DataObject, tag: int, layers: int, odd: str) -> None:
            sequences = self.protocol.sequences
            names = self.some(data, self.protocol.in_progress)
            first = sequences[names[0]].seen if names[0] in sequences else 0
            if data.draw(st.booleans()):
                names = [
                    name for name in names if name in sequences and sequences[name].seen == first
                ] or names
            layers = min(layers, max(1, LAYERS - first)) if data.draw(st.booleans()) else layers
            experts, gates = data.draw(routed(len(names), layers)), data.draw(weighted(len(names), layers))
            if odd == "id":
                experts[-1][-1][-1] = TOY_SPEC.num_experts
            if odd == "gate" and gates:
                gates[-1][-1] = [0.0] * TOY_SPEC.top_k
            self.say(
                type="routing", sequences=names, tag=tag, first_layer=first, experts=experts, gates=gates
            )

        @precondition(lambda self: not self.talk.wire.congested)
        @rule()
        def settle(self) -> None:
            heard = loop.run_until_complete(self.talk.settled())
            expected = [answer for due in self.protocol.due for answer in self.protocol.expected(due)]
            self.protocol.due = []
            # One that has to wait for history comes behind the others.
            for came, wanted in zip(sorted(heard, key=whose), sorted(expected, key=whose), strict=True):
                assert rounded(came) == pytest.approx(rounded(wanted), abs=2e-5)

        @rule()
        def congest_or_relieve(self) -> None:
            if self.talk.wire.congested:
                self.talk.relieve()
                self.settle()
            else:
                self.talk.congest()
                assert loop.run_until_complete(self.talk.settled()) == []

        def some(self, data: st.DataObject, fitting: set[int]) -> list[int]:
            """Mostly sequences with which it can be done."""
            if fitting and data.draw(st.sampled_from([True, True, True, False])):
                return data.draw(st.lists(st.sampled_from(sorted(fitting)), min_size=1, unique=True))
            return data.draw(names)

        def say(self, **message: Any) -> None:
            if self.talk.wire.congested and not self.protocol.allows(message):
                return  # an error that cannot be told ends the connection: tested elsewhere
            taken = self.protocol.take(message)
            kind = message.pop("type")
            self.talk.say(kind, **message)
            errors = self.talk.heard()
            assert len(errors) == (not taken), errors
            for error in errors:
                assert (error["code"], error["tag"]) == ("invalid_message", message.get("tag", 0))
                assert FIELDS.match(error["message"]), error["message"]
                assert not error["fatal"] and error["remedy"]

        def teardown(self) -> None:
            if hasattr(self, "talk"):
                if not self.talk.wire.congested:
                    self.settle()
                assert service.in_use == len(self.protocol.sequences)
                self.talk.leave()
                assert service.in_use == 0

    run_state_machine_as_test(
        Conversations, settings=settings(deadline=None, max_examples=100, stateful_step_count=30)
    )


def whose(answer: Message) -> tuple[str, int]:
    """A sequence waits for one forecast at most: its name tells which one this is."""
    return answer["type"], (answer["sequences"] if "sequences" in answer else names_of(answer))[0]


def names_of(forecast: Message) -> list[int]:
    return [prediction["sequence"] for prediction in forecast["predictions"]]


def rounded(answer: Message) -> dict[str, Any]:
    """A forecast as one flat dict, which approx can compare."""
    flat: dict[str, Any] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{path}.{name}", inner)
        elif isinstance(value, list):
            flat[f"{path}.length"] = len(value)
            for place, inner in enumerate(value):
                add(f"{path}.{place}", inner)
        else:
            flat[path] = value

    add("", answer)
    return flat
