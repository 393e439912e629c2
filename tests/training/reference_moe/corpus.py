"""Little texts of two kinds, and a reference model's smallest training on them."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import tests.training.toy_models as toy_models
from training.reference_moe.config import DEFAULTS, ReferenceConfig
from training.reference_moe.loop import Trainer
from training.reference_moe.pipeline import train
from training.reference_moe.texts import folder_documents, write_texts

TINY = {
    shape: replace(
        config,
        vocabulary=280,
        width=32,
        layers=4,
        experts=8,
        expert_width=8,
        context=16,
        batch_size=4,
        tokens=40 * 64,
        warmup_steps=5,
    )
    for shape, config in DEFAULTS.items()
}


def write_corpus(folder: Path) -> Path:
    """A folder in `folder` for each of two domains: English sentences, and Python."""
    code = inspect.getsource(toy_models)
    for number in range(8):
        for domain, text in {
            "code": code[number * 700 : number * 700 + 900],
            "prose": " ".join(f"The {word} of day {number} is long." for word in inspect.__doc__.split()),
        }.items():
            file = folder / domain / f"part-{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{number}: {text}\n", encoding="utf-8")
    return folder


def write_split_corpus(folder: Path) -> Path:
    """The same, split as the command does it."""
    out = folder / "texts"
    write_texts(folder_documents(write_corpus(folder / "corpus")), out, 1_000_000)
    return out


def trained(
    config: ReferenceConfig, texts: Path, run: Path, *, resume: bool = False, minutes: float = 60
) -> Trainer:
    return train(config, texts, run, device="cpu", minutes=minutes, resume=resume)
