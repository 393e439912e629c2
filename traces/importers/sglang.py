"""Reads the routing in responses of SGLang's API (`return_routed_experts: true`).

    {"text": "...", "output_ids": [1879, 0], "meta_info": {"prompt_tokens": 2, "completion_tokens": 2,
      "routed_experts": "AwAAAAEAAAA..."}}

`routed_experts` is base64 of bare integers, [tokens, layers, top_k] one after another, of the prompt and the
completion without its last token. Nothing in the response tells layers and top_k: they must be told, and the
response's count of tokens checks them. What is certain of the format: docs/importing.md.

    specmoe traces import responses.jsonl --out traces/ \\
        --model qwen3-30b-a3b --num-experts 128 --num-layers 48 --top-k 8
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Shaped

from traces.importers import completions
from traces.importers.completions import known_ids
from traces.importers.json_records import STORE_AGAIN, Record
from traces.importers.packed import unpack
from traces.importers.recorded import Recorded
from traces.importers.told import Imported, Told, needed

DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int32", "uint16", "uint8")}
# Where routing is: beside /generate's other numbers, or in an extension of OpenAI's answers.
PLACES = ("meta_info", "sglext", "sgl_ext")
ENABLE = (
    "Start the server with --enable-return-routed-experts and send requests with return_routed_experts: true."
)


def read(path: Path, told: Told) -> Imported:
    """The trace in `path`, a sequence for each completion.

    Raises TraceError naming the line and the reason where a response is malformed.
    """
    layers = needed(path, told.num_layers, "how many layers the model has, dense ones too", "--num-layers")
    top_k = needed(path, told.top_k, "how many experts a token is routed to", "--top-k")

    def sequences(response: Record) -> Iterator[Recorded | None]:
        for name, fields in _places(response) or [("", {})]:
            yield _recorded(response, name, fields, layers, top_k)

    return completions.read(path, told, sequences, enable=ENABLE)


def is_response(fields: dict[str, Any]) -> bool:
    """Whether an object looks like a response of SGLang."""
    return any(place in holder for _, holder in _holders(fields) for place in PLACES)


def _holders(fields: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The response and its choices, with their names."""
    choices = fields.get("choices")
    named = enumerate(choices) if isinstance(choices, list) else ()
    return [("", fields)] + [
        (f"choices[{number}].", choice) for number, choice in named if isinstance(choice, dict)
    ]


def _places(response: Record) -> list[tuple[str, dict[str, Any]]]:
    """What may hold routing, with its name: one object of the response, or of each choice."""
    places = []
    for name, holder in _holders(response.fields):
        found = [(f"{name}{place}", holder[place]) for place in PLACES if isinstance(holder.get(place), dict)]
        places += ([pair for pair in found if "routed_experts" in pair[1]] or found)[:1]
    return places


def _recorded(
    response: Record, name: str, fields: dict[str, Any], layers: int, top_k: int
) -> Recorded | None:
    """The sequence of one completion; None where it has no routing."""
    if fields.get("routed_experts") is None:
        return None
    experts = _experts(response, name, fields, (layers, top_k))
    prompt, generated = _counts(response, fields)
    start = _count(response, fields.get("routed_experts_start_len", 0), f"{name}.routed_experts_start_len")
    if prompt is not None and generated is not None and len(experts) != prompt + generated - 1 - start:
        raise response.refused(
            f"{name}.routed_experts has {len(experts)} tokens of {layers} layers and top-{top_k}, expected"
            f" {prompt + generated - 1 - start}: {prompt} of the prompt and {generated} of the completion,"
            f" without its last{f' and the first {start}' if start else ''}.",
            "Correct --num-layers (dense ones count too) and --top-k.",
        )
    ids = response.token_ids(response.fields.get("output_ids"), "output_ids")
    token_ids = known_ids(response, name, len(experts), _prompt_ids(response, fields, prompt), ids)
    return Recorded(f"{response.where}, {name}", experts, token_ids=token_ids)


def _experts(
    response: Record, name: str, fields: dict[str, Any], shape: tuple[int, int]
) -> Shaped[np.ndarray, "n D K"]:
    dtype = DTYPES.get(fields.get("routed_experts_dtype") or "int32")
    if dtype is None:
        raise response.refused(
            f"{name}.routed_experts_dtype is {fields['routed_experts_dtype']!r}, expected one of"
            f" {', '.join(DTYPES)}.",
            STORE_AGAIN,
        )
    if not isinstance(fields["routed_experts"], str):
        raise response.refused(f"{name}.routed_experts is no text, expected base64.", STORE_AGAIN)
    try:
        data = unpack(fields["routed_experts"])
    except ValueError as error:
        raise response.refused(f"{name}.routed_experts: {error}.", STORE_AGAIN) from error
    token_bytes = dtype.itemsize * shape[0] * shape[1]
    if len(data) % token_bytes:
        raise response.refused(
            f"{name}.routed_experts has {len(data)} bytes, expected a multiple of {token_bytes}:"
            f" {dtype.name} of {shape[0]} layers and top-{shape[1]}.",
            "Correct --num-layers (dense ones count too) and --top-k.",
        )
    return np.frombuffer(data, dtype).reshape(-1, *shape)


def _counts(response: Record, fields: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the completion, where the response says so of this completion alone."""
    usage = response.fields.get("usage")
    if "prompt_tokens" not in fields and isinstance(usage, dict) and len(_holders(response.fields)) == 2:
        fields = usage
    prompt, generated = (fields.get(f"{part}_tokens") for part in ("prompt", "completion"))
    return (
        None if prompt is None else _count(response, prompt, "prompt_tokens"),
        None if generated is None else _count(response, generated, "completion_tokens"),
    )


def _count(response: Record, value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise response.refused(f"{name} is {value!r}, expected a number of tokens.", STORE_AGAIN)
    return value


def _prompt_ids(
    response: Record, fields: dict[str, Any], prompt: int | None
) -> Int32[np.ndarray, "p"] | None:
    """The prompt's tokens, which come beside their probabilities if the request asked for all of those."""
    listed = fields.get("input_token_logprobs")
    if not isinstance(listed, list) or len(listed) != prompt:
        return None
    if not all(isinstance(item, list) and len(item) >= 2 for item in listed):
        raise response.refused("input_token_logprobs is no list of [probability, token id].", STORE_AGAIN)
    return response.token_ids([item[1] for item in listed], "input_token_logprobs")
