"""Messages that a client may send, made up by hypothesis in their JSON form."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.service.stream.frames import Message
from tests.toy_version import TOY_SPEC
from traces.spec import RoutingSpec

U32 = st.integers(0, 2**32 - 1)
names = st.lists(U32, min_size=1, max_size=5, unique=True)
# What is the same number in float32 and in JSON.
weight = st.floats(0.0009765625, 1000.0, width=32)


@st.composite
def routed(draw: st.DrawFn, count: int, layers: int, spec: RoutingSpec = TOY_SPEC) -> list[Any]:
    """Experts [count, layers, K]."""
    one = st.permutations(range(spec.num_experts)).map(lambda order: list(order[: spec.top_k]))
    return draw(st.lists(st.lists(one, min_size=layers, max_size=layers), min_size=count, max_size=count))


@st.composite
def weighted(draw: st.DrawFn, count: int, layers: int, spec: RoutingSpec = TOY_SPEC) -> list[Any]:
    """Gates [count, layers, K], or None."""
    if draw(st.booleans()):
        return None
    size = count * layers * spec.top_k
    flat = draw(st.lists(weight, min_size=size, max_size=size))
    return np.array(flat).reshape(count, layers, spec.top_k).tolist()


@st.composite
def token_ids(draw: st.DrawFn, count: int) -> list[int] | None:
    return draw(st.none() | st.lists(st.integers(-1, 2**31 - 1), min_size=count, max_size=count))


@st.composite
def hello(draw: st.DrawFn) -> Message:
    limit = draw(
        st.sampled_from(
            [
                {"top_n": None},
                {"top_n": 3},
                {"top_n": 512},
                {"coverage": 0.9},
                {"coverage": 0.99, "adapt": True},
            ]
        )
    )
    return {
        "type": "hello",
        "tag": draw(U32),
        "model": draw(st.sampled_from(["toy", "other", "ünïcode"])),
        "version": draw(st.sampled_from([None, 1, 2, "production"])),
        "per_sequence": draw(st.booleans()),
        "union": draw(st.booleans()),
        "at_start": draw(st.booleans()),
        "every": draw(st.integers(0, 5)),
        "ahead": draw(st.integers(0, 5)),
        "deadline_us": draw(U32),
        **limit,
    }


@st.composite
def named(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(["open", "end", "ask", "close"]))
    return {"type": kind, "tag": draw(U32), "sequences": draw(names)}


@st.composite
def start(draw: st.DrawFn) -> Message:
    sequences = draw(names)
    told = draw(token_ids(len(sequences)))
    return {"type": "start", "tag": draw(U32), "sequences": sequences, "token_ids": told}


@st.composite
def routing(draw: st.DrawFn) -> Message:
    sequences, layers = draw(names), draw(st.integers(1, TOY_SPEC.num_layers))
    return {
        "type": "routing",
        "tag": draw(U32),
        "sequences": sequences,
        "first_layer": draw(st.integers(0, TOY_SPEC.num_layers)),
        "experts": draw(routed(len(sequences), layers)),
        "gates": draw(weighted(len(sequences), layers)),
    }


@st.composite
def context(draw: st.DrawFn) -> Message:
    tokens = draw(st.integers(1, 3))
    return {
        "type": "context",
        "tag": draw(U32),
        "sequence": draw(U32),
        "token_ids": draw(token_ids(tokens)),
        "experts": draw(routed(tokens, TOY_SPEC.num_layers)),
        "gates": draw(weighted(tokens, TOY_SPEC.num_layers)),
    }


after_hello = named() | start() | routing() | context()
any_message = hello() | after_hello
