"""Messages as JSON text, for people and for debugging: the same ones as in binary, fields by name.

str -> `parse` -> messages; messages -> `Text` -> str

.venv/bin/python -m pytest tests/service/stream/test_text.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from jaxtyping import Float32, Integer
from pydantic import Field, TypeAdapter, ValidationError

from service.answers import DECIMALS
from service.errors import MessageInvalid, MessageUnreadable
from service.explain import explained, shown
from service.schemas import MAX_TOKEN_ID, Checked, Expert, Gate, Request, VersionSelector
from service.stream.messages import (
    MAX_COUNT,
    PROTOCOL,
    Context,
    Hello,
    Kind,
    Message,
    Named,
    Ranking,
    Routing,
    Start,
    Welcome,
)
from traces.spec import MAX_EXPERTS, MAX_LAYERS, RoutingSpec

SEE = "docs/stream-protocol.md shows every message."
MAX_U32 = 2**32 - 1

SequenceNumber = Annotated[int, Field(ge=0, le=MAX_U32)]
Sequences = Annotated[Checked[SequenceNumber], Field(min_length=1, max_length=MAX_COUNT)]
Tag = Annotated[int, Field(ge=0, le=MAX_U32)]
TokenId = Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)]
Layers = Annotated[int, Field(ge=0, le=MAX_LAYERS)]


class _HelloText(Request):
    type: Literal["hello"]
    tag: Tag = 0
    model: str = Field(max_length=100)
    version: VersionSelector = None
    per_sequence: bool = True
    union: bool = False
    top_n: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    adapt: bool = False
    ahead: Layers = 0
    at_start: bool = True
    every: Layers = 1
    deadline_us: Annotated[int, Field(ge=0, le=MAX_U32)] = 0

    def message(self, spec: RoutingSpec | None) -> Message:
        return Hello(**self.model_dump(exclude={"type"}))


class _NamedText(Request):
    type: Literal["open", "end", "ask", "close"]
    tag: Tag = 0
    sequences: Sequences

    def message(self, spec: RoutingSpec) -> Message:
        return Named(Kind[self.type.upper()], self.tag, self.sequences)


class _ContextText(Request):
    type: Literal["context"]
    tag: Tag = 0
    sequence: SequenceNumber
    token_ids: Checked[TokenId] | None = None
    experts: Annotated[Checked[Checked[Checked[Expert]]], Field(min_length=1)]
    gates: Checked[Checked[Checked[Gate]]] | None = None

    def message(self, spec: RoutingSpec) -> Message:
        shape = (len(self.experts), spec.num_layers, spec.top_k)
        token_ids = _token_ids(self.token_ids, shape[0])
        return Context(self.tag, self.sequence, token_ids, *_routed(self.experts, self.gates, shape))


class _StartText(Request):
    type: Literal["start"]
    tag: Tag = 0
    sequences: Sequences
    token_ids: Checked[TokenId] | None = None

    def message(self, spec: RoutingSpec) -> Message:
        return Start(self.tag, self.sequences, _token_ids(self.token_ids, len(self.sequences)))


class _RoutingText(Request):
    type: Literal["routing"]
    tag: Tag = 0
    sequences: Sequences
    first_layer: Layers
    experts: Annotated[Checked[Checked[Checked[Expert]]], Field(min_length=1)]
    gates: Checked[Checked[Checked[Gate]]] | None = None

    def message(self, spec: RoutingSpec) -> Message:
        layers = max(1, len(self.experts[0]))
        shape = (len(self.sequences), layers, spec.top_k)
        routed = _routed(self.experts, self.gates, shape)
        return Routing(self.tag, self.sequences, self.first_layer, *routed)


_Text = _HelloText | _NamedText | _ContextText | _StartText | _RoutingText
_TEXT: TypeAdapter[_Text] = TypeAdapter(Annotated[_Text, Field(discriminator="type")])


def parse(text: str | bytes, spec: RoutingSpec | None) -> Message:
    """A client's message. spec: of the model, None before hello.

    Raises MessageUnreadable where it is no object of a known type, MessageInvalid where a field is wrong.
    """
    try:
        parsed = _TEXT.validate_json(text)
    except ValidationError as error:
        raise _refusal(error) from None
    if isinstance(parsed, _HelloText):
        return parsed.message(spec)
    if spec is None:
        raise MessageUnreadable(f"{parsed.type} came before hello.", remedy=SEE)
    return parsed.message(spec)


def _refusal(error: ValidationError) -> MessageInvalid | MessageUnreadable:
    problems = error.errors(include_url=False)
    first = problems[0]
    match first["type"]:
        case "union_tag_invalid":
            came, expected = shown(first["ctx"]["tag"]), first["ctx"]["expected_tags"]
            return MessageUnreadable(f"type is {came}, expected {expected}.", remedy=SEE)
        case "union_tag_not_found":
            return MessageUnreadable("type is missing.", remedy=SEE)
    # The first part of a location is the message's type, which everybody knows.
    told = [{**problem, "loc": problem["loc"][1:]} for problem in problems]
    message = explained(told).message  # type: ignore[arg-type]
    if first["loc"]:
        return MessageInvalid(f"{first['loc'][0]}.{message.replace('of this request', 'of it')}", remedy=SEE)
    # It is no JSON, or no object.
    return MessageUnreadable("The message" + message.removeprefix("The body"), remedy=SEE)


def _token_ids(given: list[int] | None, count: int) -> np.ndarray[Any, Any]:
    if given is None:
        return np.full(count, -1, np.int64)
    if len(given) != count:
        raise MessageInvalid(f"token_ids has {len(given)} entries, expected {count}.", remedy=SEE)
    return np.array(given, np.int64)


def _routed(
    experts: list[list[list[int]]], gates: list[list[list[float]]] | None, shape: tuple[int, int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    weights = None if gates is None else _array("gates", gates, shape).astype(np.float32)
    return _array("experts", experts, shape).astype(np.int32), weights


def _array(name: str, values: list[Any], shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    if len(values) != shape[0]:
        raise MessageInvalid(f"{name} has {len(values)} entries, expected {shape[0]}.", remedy=SEE)
    for row, layers in enumerate(values):
        if len(layers) != shape[1]:
            raise MessageInvalid(f"{name}[{row}] has {len(layers)} layers, expected {shape[1]}.", remedy=SEE)
        for layer, slots in enumerate(layers):
            if len(slots) != shape[2]:
                raise MessageInvalid(
                    f"{name}[{row}][{layer}] has {len(slots)} entries, expected top_k = {shape[2]}.",
                    remedy=SEE,
                )
    return np.array(values)


class Text:
    """The service's messages as JSON."""

    def welcome(self, welcome: Welcome) -> str:
        return _text("welcome", protocol=PROTOCOL, **asdict(welcome))

    def forecast(self, ranking: Ranking) -> str:
        # With distances, which depend on a sequence's seen layers alone: all n have seen the same ones.
        predictions = [
            {
                "sequence": sequence,
                "token": token,
                "layers": _layers(ranking.first_layer, experts, probabilities, sizes, with_distance=True),
            }
            for sequence, token, experts, probabilities, sizes in zip(
                ranking.sequences,
                ranking.tokens,
                ranking.experts,
                ranking.probabilities,
                ranking.sizes,
                strict=True,
            )
        ]
        return _text(
            "forecast",
            tag=ranking.tag,
            first_layer=ranking.first_layer,
            dropped=ranking.dropped,
            predictions=predictions,
        )

    def union(self, ranking: Ranking) -> str:
        return _text(
            "union",
            tag=ranking.tag,
            first_layer=ranking.first_layer,
            dropped=ranking.dropped,
            sequences=list(ranking.sequences),
            tokens=list(ranking.tokens),
            layers=_layers(
                ranking.first_layer,
                ranking.experts,
                ranking.probabilities,
                ranking.sizes,
                with_distance=False,
            ),
        )

    def error(self, tag: int, code: str, message: str, remedy: str, *, fatal: bool) -> str:
        return _text("error", tag=tag, fatal=fatal, code=code, message=message, remedy=remedy)

    def goodbye(self, milliseconds: int) -> str:
        return _text("goodbye", milliseconds=milliseconds)

    def expired(self, sequences: Sequence[int]) -> str:
        return _text("expired", sequences=list(sequences))


def _layers(
    first_layer: int,
    experts: Integer[np.ndarray, "m w"],
    probabilities: Float32[np.ndarray, "m w"],
    sizes: Integer[np.ndarray, "m"],
    *,
    with_distance: bool,
) -> list[dict[str, Any]]:
    listed, rounded = experts.tolist(), np.round(probabilities.astype(np.float64), DECIMALS).tolist()
    return [
        {
            "layer": first_layer + row,
            **({"distance": row + 1} if with_distance else {}),
            "experts": listed[row][:size],
            "probabilities": rounded[row][:size],
        }
        for row, size in enumerate(sizes.tolist())
    ]


def _text(kind: str, **fields: Any) -> str:
    return orjson.dumps({"type": kind, **fields}).decode()
