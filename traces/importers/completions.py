"""What the importers of API responses share: a trace of responses with routing, and token ids for it.

specmoe traces import responses.jsonl --out traces/ --num-experts 128
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from traces.errors import TraceError
from traces.importers import json_records
from traces.importers.json_records import STORE_AGAIN, Record
from traces.importers.model import model_name
from traces.importers.recorded import Fillers, Recorded, trace_of
from traces.importers.told import Imported, Told, needed
from traces.trace import UNKNOWN_TOKEN

# -1 where a prefix came from the cache, 255 and 65535 the same unsigned, 0 where nothing was written.
FILLERS = Fillers((255, 65535, 0), zero_layers=True)
NO_EXPERTS = "completions were left out: they have no routed_experts"


def read(
    path: Path, told: Told, completions: Callable[[Record], Iterator[Recorded | None]], *, enable: str
) -> Imported:
    """The trace in the responses of a file, of which `completions` gives the sequences, None without routing.

    enable: what to do where none has any. Raises TraceError naming the line and the reason.
    """
    num_experts = needed(path, told.num_experts, "how many experts a layer has", "--num-experts")
    sequences: list[Recorded] = []
    without, model = 0, told.model
    for response in json_records.read(path):
        model = model or _model(response)
        if told.model is None and _model(response) != model:
            raise response.refused(
                f"the model is {_model(response)!r}, expected {model!r} as before.",
                "Keep each model's responses in a file of their own.",
            )
        for recorded in completions(response):
            if recorded is None:
                without += 1
            else:
                sequences.append(recorded)
    if not sequences or model is None:
        raise TraceError(f"{path}: no response of it has routed_experts.", remedy=enable)
    imported = trace_of(path, sequences, model=model, num_experts=num_experts, fillers=FILLERS)
    return replace(imported, notes={**imported.notes, NO_EXPERTS: without})


def _model(response: Record) -> str:
    name = response.fields.get("model")
    if not isinstance(name, str):
        raise response.refused("it does not name its model.", "Name it: --model NAME.")
    return model_name(name)


def choices_of(response: Record) -> list[dict[str, Any]]:
    """The response's choices. Raises TraceError where it has none."""
    choices = response.fields.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise response.refused("it has no list of choices.", STORE_AGAIN)
    return choices


def known_ids(
    response: Record,
    name: str,
    tokens: int,
    prompt_ids: Int32[np.ndarray, "p"] | None,
    ids: Int32[np.ndarray, "g"] | None,
) -> Int32[np.ndarray, "n"] | None:
    """Token ids of routing that ends before the completion's last token. -1 before the first known one."""
    if ids is None:
        return None
    put_in = ids[:-1] if prompt_ids is None else np.concatenate([prompt_ids, ids])[:-1]
    if prompt_ids is not None and tokens > len(put_in):
        raise response.refused(
            f"{name} has {tokens} tokens, expected {len(put_in)} at most: {len(prompt_ids)} of the prompt and"
            f" {len(ids)} of the completion, without its last.",
            STORE_AGAIN,
        )
    token_ids = np.full(tokens, UNKNOWN_TOKEN, np.int32)
    known = min(tokens, len(put_in))
    if known:
        token_ids[-known:] = put_in[-known:]
    return token_ids
