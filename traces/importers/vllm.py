"""Reads the routing in responses of vLLM's API (`vllm serve --enable-return-routed-experts`).

    {"model": "Qwen/Qwen3-30B-A3B", "prompt_token_ids": [9707, 11], "choices": [
      {"index": 0, "token_ids": [1879, 0], "routed_experts": "k05VTVBZAQB2AHs..."}]}

`routed_experts` is base64 of a .npy file: integers [tokens, layers, top_k] of the prompt and the completion,
without its last token, which was never put in. vLLM 0.21 wrote lists of numbers instead, those of the prompt
apart, as the response's `prompt_routed_experts`. Both are read; what is certain of it: docs/importing.md.

    specmoe traces import responses.jsonl --out traces/ --num-experts 128
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Shaped

from traces.importers import completions
from traces.importers.completions import choices_of, known_ids
from traces.importers.json_records import STORE_AGAIN, Record
from traces.importers.packed import unpack_npy
from traces.importers.recorded import Recorded
from traces.importers.told import Imported, Told
from traces.trace import UNKNOWN_TOKEN

ENABLE = "Start the server with --enable-return-routed-experts."
DIMENSIONS = "[tokens, layers, top_k]"


def read(path: Path, told: Told) -> Imported:
    """The trace in `path`, a sequence for each completion.

    Raises TraceError naming the line and the reason where a response is malformed.
    """
    return completions.read(path, told, _completions, enable=ENABLE)


def _completions(response: Record) -> Iterator[Recorded | None]:
    """Each choice as a sequence with its prompt; None where it has no routing."""
    prompt = _array(response, "prompt_routed_experts", response.fields.get("prompt_routed_experts"))
    for number, choice in enumerate(choices_of(response)):
        name = f"choices[{number}].routed_experts"
        experts = _array(response, name, choice.get("routed_experts"))
        if experts is None:
            yield None
            continue
        prompt_ids = choice.get("prompt_token_ids") or response.fields.get("prompt_token_ids")
        prompt_ids = response.token_ids(prompt_ids, "prompt_token_ids")
        ids = response.token_ids(choice.get("token_ids"), f"choices[{number}].token_ids")
        if prompt is None:
            token_ids = known_ids(response, name, len(experts), prompt_ids, ids)
        else:
            experts = _joined(response, prompt, experts)
            token_ids = _apart(response, len(prompt), len(experts), prompt_ids, ids)
        yield Recorded(f"{response.where}, choice {number}", experts, token_ids=token_ids)


def _array(response: Record, name: str, value: Any) -> Shaped[np.ndarray, "n D K"] | None:
    """Routed experts, from base64 of a .npy file or from lists."""
    if value is None:
        return None
    try:
        array = unpack_npy(value) if isinstance(value, str) else np.array(value)
    except (ValueError, OverflowError) as error:
        raise response.refused(f"{name}: {error}.", STORE_AGAIN) from error
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise response.refused(
            f"{name} is {array.dtype} {list(array.shape)}, expected integers {DIMENSIONS}.", STORE_AGAIN
        )
    return array


def _joined(
    response: Record, prompt: Shaped[np.ndarray, "p D K"], completion: Shaped[np.ndarray, "g D K"]
) -> Shaped[np.ndarray, "p+g D K"]:
    if prompt.shape[1:] != completion.shape[1:]:
        raise response.refused(
            f"the prompt's experts are {list(prompt.shape)}, the completion's {list(completion.shape)};"
            f" expected the same layers and top_k.",
            STORE_AGAIN,
        )
    return np.concatenate([prompt, completion])


def _apart(
    response: Record,
    prompt_tokens: int,
    tokens: int,
    prompt_ids: Int32[np.ndarray, "p"] | None,
    ids: Int32[np.ndarray, "g"] | None,
) -> Int32[np.ndarray, "n"] | None:
    """Token ids of routing that came in two parts, each from its first token on."""
    if prompt_ids is None and ids is None:
        return None
    token_ids = np.full(tokens, UNKNOWN_TOKEN, np.int32)
    for name, given, place, ends_early in (
        ("prompt_token_ids", prompt_ids, token_ids[:prompt_tokens], False),
        ("token_ids", ids, token_ids[prompt_tokens:], True),
    ):
        if given is None:
            continue
        if len(given) < len(place) or (len(given) > len(place) and not ends_early):
            raise response.refused(
                f"{name} has {len(given)} tokens, but the routing beside it {len(place)}.", STORE_AGAIN
            )
        place[:] = given[: len(place)]
    return token_ids
