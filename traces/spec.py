"""The shape of a model's routing: the leaf of the project, which every room may import."""

from __future__ import annotations

import re
from dataclasses import dataclass

from traces.errors import SpecMoEError

# A model's name is a folder of the store and a label of the metrics, so it must be harmless in both.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_LAYERS = 1024
MAX_EXPERTS = 4096


class SpecError(SpecMoEError):
    """A RoutingSpec names an impossible model."""


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """What a model's routing looks like.

    model: name, `[A-Za-z0-9][A-Za-z0-9._-]*`, at most 100 characters.
    num_layers: L, mixture-of-experts layers only, counted from 0.
    num_experts: E, routed experts of a layer, by the model's logical ids (before any load-balancing remap).
    top_k: K, how many of them a token is routed to.

    Raises SpecError where a field is out of its range.
    """

    model: str
    num_layers: int
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.model):
            raise SpecError(
                f"Model name {self.model!r} is not usable as a folder and a label.",
                remedy="Use letters, digits, '.', '_' and '-', 100 characters at most.",
            )
        for field, value, low, high in (
            ("num_layers", self.num_layers, 1, MAX_LAYERS),
            ("num_experts", self.num_experts, 2, MAX_EXPERTS),
            ("top_k", self.top_k, 1, self.num_experts),
        ):
            if not low <= value <= high:
                raise SpecError(
                    f"{field} is {value}, expected {low} to {high}.",
                    remedy="Count mixture-of-experts layers only and their routed experts only.",
                )
