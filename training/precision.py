"""In which precision the products of training are worked out: bfloat16 where asked for and where it pays.

Between a config's knob and torch. Weights, calibration, export and scores are in float32 either way.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch

PRECISIONS = ("float32", "bfloat16")
# Instructions for such products, on x86 and on ARM, as torch.cpu.get_capabilities() names them. A processor
# that has none of them imitates them: with AVX2, a step takes 17 times as long as in float32.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there. A GPU is taken to have them."""
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in INSTRUCTIONS)


def products(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context for a forward pass; float32 where bfloat16 would have to be imitated."""
    short = precision == "bfloat16" and has_bfloat16(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=short)


def tell_imitated(precision: str, device: torch.device) -> None:
    """Say so, on stderr, where float32 takes the place of the bfloat16 that was asked for."""
    if precision == "bfloat16" and not has_bfloat16(device):
        print(
            "specmoe: this processor has no instructions for bfloat16 and would imitate them, many times "
            "slower: training in float32.",
            file=sys.stderr,
        )
