"""What a decode loop asks: routing seen so far, as arrays, turned into the body of POST /v1/predict.

Sequence(experts=[[3, 1], [0, 7]], context=(Token(experts=...), ...))
"""

from __future__ import annotations

import collections.abc
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

UNKNOWN_TOKEN = -1


@dataclass(frozen=True, eq=False)
class Token:
    """One finished token of a sequence. Its JSON is made once, however often the token is sent as context.

    experts: integers `[layers, top_k]`, the routed experts of each layer from layer 0, in any order.
    gates: router weights in the same order, on any positive scale; None where unknown.
    token_id: id in the model's own tokenizer; None or -1 where unknown.
    """

    experts: npt.ArrayLike
    gates: npt.ArrayLike | None = None
    token_id: int | None = None

    @cached_property
    def fields(self) -> str:
        """The members of this token's JSON object, without the braces."""
        members: dict[str, Any] = {"experts": np.asarray(self.experts).tolist()}
        if self.gates is not None:
            members["gates"] = np.asarray(self.gates).tolist()
        if self.token_id is not None and self.token_id != UNKNOWN_TOKEN:
            members["token_id"] = int(self.token_id)
        return json.dumps(members, separators=(",", ":"))[1:-1]


@dataclass(frozen=True, eq=False)
class Sequence(Token):
    """A sequence being generated: the token in progress, its layers seen so far, the tokens before it.

    experts, gates, token_id: of the token in progress; `[0, top_k]` or `[]` at the start of the token.
    context: finished tokens of this sequence, oldest first. The service keeps nothing between two questions:
        what is not sent is not known. A few tokens give most of the gain; sending none is allowed.
    """

    experts: npt.ArrayLike = ()
    context: collections.abc.Sequence[Token] = ()

    def json(self) -> str:
        """This sequence as a JSON object."""
        context = ",".join(f"{{{token.fields}}}" for token in self.context)
        return f'{{{self.fields},"context":[{context}]}}'


class Options(TypedDict, total=False):
    """What to predict. `top_n` and `coverage` exclude each other; with neither, 2 * top_k experts a layer.

    version: a number, an alias, or None for the one the service serves.
    layers: target layers; None for all that are not seen yet.
    top_n: experts a layer.
    coverage: as many experts a layer as hold all the routed ones with this probability, 0 to 1.
    """

    version: int | str | None
    layers: collections.abc.Sequence[int] | None
    top_n: int | None
    coverage: float | None


def as_list(sequences: Sequence | collections.abc.Sequence[Sequence]) -> list[Sequence]:
    """One sequence or several, as several."""
    return [sequences] if isinstance(sequences, Sequence) else list(sequences)


def predict_body(
    model: str,
    sequences: collections.abc.Sequence[Sequence],
    options: Options,
    combine: Literal["per_sequence", "union"],
) -> bytes:
    """The body of POST /v1/predict."""
    members: dict[str, Any] = {"model": model, "combine": combine}
    # By way of numpy: its whole numbers and arrays are as welcome as Python's.
    members |= {name: np.asarray(value).tolist() for name, value in options.items() if value is not None}
    joined = ",".join(sequence.json() for sequence in sequences)
    return f'{json.dumps(members)[:-1]},"sequences":[{joined}]}}'.encode()
