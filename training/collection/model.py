"""Loads a model of `transformers` and its tokenizer from a folder or a hub; runs no code that comes with it.

python -c "from training.collection.model import load; print(load('folder', device='cpu', dtype='auto'))"
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from training.errors import ModelNotLoaded

REMEDY = "Give a hub's name, or a folder with model and tokenizer as save_pretrained writes them."
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and its tokenizer. encoder_decoder: whether it has two stacks."""

    name: str
    model: Any
    tokenizer: Any
    encoder_decoder: bool

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_id(self) -> int:
        """What fills a batch up; masked out, so any token will do."""
        return self.tokenizer.pad_token_id or 0

    @property
    def start_id(self) -> int:
        """What a decoder begins with."""
        start = self.model.config.decoder_start_token_id
        return self.pad_id if start is None else start

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a generated text."""
        ends = self.model.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())


def load(name: str, *, device: str, dtype: str) -> Loaded:
    """The model in folder `name`, or of that name on the hub.

    device: as torch names it; `auto` a GPU where there is one. dtype: one of DTYPES, `auto` as it was saved.

    Raises ModelNotLoaded where it does not exist, is damaged, has no tokenizer, or the device is not there.
    """
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # a hub's name begins otherwise
        raise ModelNotLoaded(f"There is no folder {name}.", remedy=REMEDY)
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = kind.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelNotLoaded(
            f"{name} cannot be loaded: {_first_line(error)}",
            remedy=REMEDY,
        ) from error
    try:
        model = model.to(_device(device))
    except (RuntimeError, AssertionError) as error:
        raise ModelNotLoaded(
            f"{name} does not fit onto device {device!r}: {_first_line(error)}",
            remedy="Choose another --device, or a smaller --dtype.",
        ) from error
    return Loaded(usable(name), model.eval(), tokenizer, bool(config.is_encoder_decoder))


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def usable(name: str) -> str:
    """The last part of a folder or a hub's name, as a RoutingSpec allows it."""
    last = Path(name).resolve().name if Path(name).exists() else name.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:80].lower() or "model"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
