"""Half precision is used where it was asked for and the processor has it, and not imitated elsewhere."""

from __future__ import annotations

import pytest
import torch

from training.precision import INSTRUCTIONS, products, tell_imitated

CPU = torch.device("cpu")


def product(precision: str) -> torch.dtype:
    with products(precision, CPU):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_a_processor_that_has_it_multiplies_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], instructions: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, instructions: True})
    assert (product("bfloat16"), product("float32")) == (torch.bfloat16, torch.float32)
    tell_imitated("bfloat16", CPU)
    assert capsys.readouterr().err == ""


def test_one_that_lacks_it_multiplies_in_float32_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert product("bfloat16") == torch.float32
    tell_imitated("float32", CPU)
    assert capsys.readouterr().err == ""
    tell_imitated("bfloat16", CPU)
    assert capsys.readouterr().err.endswith("training in float32.\n")
