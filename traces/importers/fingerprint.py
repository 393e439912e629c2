"""Reads the examples of GPT-OSS-MoE-ExpertFingerprinting: routing of gpt-oss with its probabilities, as JSON.

    {"dataset": "gpqa_diamond", "category": "Genetics", "router_data": [{"token_178": {
      "layer_0": {"selected_experts": [31, 21, 22, 6], "selected_probs": [0.5, 0.2, 0.2, 0.1]}, ...}}, ...]}

A file holds one example or a list of them, each a sequence of generated tokens. N of token_N is a token's
place in the text; where one is missing, another sequence begins. Of the text there are words, no token ids.

    specmoe traces import True_False_examples.json --out traces/ --model gpt-oss-20b --num-experts 32
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from traces.errors import TraceError, TraceFormatError
from traces.importers import json_records
from traces.importers.json_records import STORE_AGAIN, Record
from traces.importers.recorded import Recorded, trace_of
from traces.importers.told import Imported, Told, needed
from traces.trace import UNKNOWN_DOMAIN

TOKEN = re.compile(r"token_(\d{1,9})")
LAYER = re.compile(r"layer_(\d{1,4})")
FIELDS = ("selected_experts", "selected_probs")

Cells = dict[int, dict[str, Any]]


def read(path: Path, told: Told) -> Imported:
    """The trace in `path`, of domains like "gpqa_diamond/Genetics", with gates.

    Raises TraceError naming the example, token and layer where it is malformed.
    """
    if told.model is None:
        raise TraceFormatError(f"{path} does not name its model.", remedy="Name it: --model NAME.")
    sequences: list[Recorded] = []
    layers: list[int] | None = None
    num_experts = told.num_experts
    for record in json_records.read(path):
        tokens = list(_tokens(record))
        if tokens:
            layers = layers or sorted(tokens[0][1])
            num_experts = num_experts or _scores(tokens[0][1])
            sequences += _sequences(record, tokens, layers)
    if layers is None:
        raise TraceError(f"{path} has no tokens in router_data.", remedy="Give a file of examples.")
    experts = needed(path, num_experts, "how many experts a layer has", "--num-experts")
    return trace_of(path, sequences, model=told.model, num_experts=experts, layers=layers)


def _scores(cells: Cells) -> int | None:
    """How many experts were scored, where the scores were not taken out."""
    scores = next(iter(cells.values())).get("full_scores")
    return len(scores) if isinstance(scores, list) else None


def _tokens(record: Record) -> Iterator[tuple[int, Cells]]:
    """Each token's place in the text, and its layers by their number."""
    items = record.fields.get("router_data")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise record.refused("router_data is missing, or no list of objects.", STORE_AGAIN)
    last = -1
    for item in items:
        for name, layers in item.items():
            found = TOKEN.fullmatch(name)
            if found is None or int(found[1]) <= last:
                raise record.refused(
                    f"found {name[:50]!r} after token_{last}, expected a later token.", STORE_AGAIN
                )
            last = int(found[1])
            yield last, _cells(record, name, layers)


def _cells(record: Record, token: str, layers: Any) -> Cells:
    if not isinstance(layers, dict) or not layers:
        raise record.refused(f"{token} is no object of layers.", STORE_AGAIN)
    cells = {}
    for name, cell in layers.items():
        found = LAYER.fullmatch(name)
        if found is None or not isinstance(cell, dict):
            raise record.refused(f"{token} has {name[:50]!r}, expected layer_N and an object.", STORE_AGAIN)
        cells[int(found[1])] = cell
    return cells


def _sequences(record: Record, tokens: list[tuple[int, Cells]], layers: list[int]) -> Iterator[Recorded]:
    """The runs of tokens at places that follow one another."""
    places = np.array([place for place, _ in tokens])
    experts, gates = _values(record, tokens, layers)
    for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1):
        yield Recorded(
            f"{record.where}, from token_{places[run[0]]}",
            experts[run],
            gates=gates[run],
            domain=_domain(record),
        )


def _values(
    record: Record, tokens: list[tuple[int, Cells]], layers: list[int]
) -> tuple[Int64[np.ndarray, "n L K"], Float32[np.ndarray, "n L K"]]:
    rows: dict[str, list[Any]] = {name: [] for name in FIELDS}
    top_k = 0
    for place, cells in tokens:
        if sorted(cells) != layers:
            raise record.refused(
                f"token_{place} has {len(cells)} layers, expected {len(layers)}: {layers}.", STORE_AGAIN
            )
        for layer in layers:
            for name, kinds in zip(FIELDS, ((int,), (int, float)), strict=True):
                values = cells[layer].get(name)
                if not isinstance(values, list) or not values or {*map(type, values)} - {*kinds}:
                    raise record.refused(
                        f"token_{place}, layer_{layer}: {name} is {str(values)[:100]}, expected numbers.",
                        STORE_AGAIN,
                    )
                top_k = top_k or len(values)
                if len(values) != top_k:
                    raise record.refused(
                        f"token_{place}, layer_{layer}: {name} has {len(values)} numbers, expected {top_k}.",
                        STORE_AGAIN,
                    )
                rows[name].append(values)
    shape = (len(tokens), len(layers), top_k)
    try:
        experts = np.array(rows["selected_experts"], np.int64).reshape(shape)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and the check refuses it
            return experts, np.array(rows["selected_probs"], np.float32).reshape(shape)
    except OverflowError as error:
        raise record.refused(f"a number is too large: {error}.", STORE_AGAIN) from error


def _domain(record: Record) -> str:
    """The data set and its category, as far as the example tells them."""
    parts = [record.fields.get(name) for name in ("dataset", "category")]
    return "/".join(part for part in parts if isinstance(part, str)) or UNKNOWN_DOMAIN
