"""What the importers share: a RoutingSpec whose refusal names the file that asked for it."""

from __future__ import annotations

from pathlib import Path

from traces.errors import TraceFormatError
from traces.spec import MODEL_NAME, RoutingSpec, SpecError


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
