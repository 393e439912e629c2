"""What the importers share: a model's name, and a RoutingSpec whose refusal names the file it is of."""

from __future__ import annotations

import re
from pathlib import Path

from traces.errors import TraceFormatError
from traces.spec import MODEL_NAME, RoutingSpec, SpecError

# A name of llama.cpp: a model in several files ends in -00001-of-00003.gguf.
MODEL_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")


def model_name(model_path: str) -> str:
    """A model's name from where it was loaded from: "Qwen/Qwen3-30B-A3B" and "/models/Qwen3-30B-A3B.gguf"
    are "Qwen3-30B-A3B"."""
    return MODEL_ENDING.sub("", re.split(r"[/\\]", model_path)[-1])


def spec_of(path: Path, model: str, *, num_layers: int, num_experts: int, top_k: int) -> RoutingSpec:
    """The spec a file describes. Raises TraceFormatError naming the file where it describes none."""
    if not MODEL_NAME.fullmatch(model):
        raise TraceFormatError(
            f"{path}: the model's name {model!r} is not usable.",
            remedy="Import it under another, of letters, digits, '.', '_' and '-':"
            " specmoe traces import SOURCE --out FOLDER --model NAME.",
        )
    try:
        return RoutingSpec(model, num_layers, num_experts, top_k)
    except SpecError as error:
        raise TraceFormatError(f"{path}: {error.message}", remedy=error.remedy) from error
