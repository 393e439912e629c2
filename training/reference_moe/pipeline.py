"""From texts to a trained reference model, in one call.

specmoe reference-moe train --texts runs/texts --run runs/reference
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging

from training.errors import ConfigInvalid, RunInvalid
from training.precision import tell_imitated
from training.reference_moe.config import ReferenceConfig
from training.reference_moe.loop import Trainer
from training.reference_moe.texts import texts_of
from training.reference_moe.tokenizer import ids_of, train_tokenizer
from training.reference_moe.windows import Ids, check_length


def train(
    config: ReferenceConfig, texts: Path, run: Path, *, device: str, minutes: float, resume: bool
) -> Trainer:
    """Train a model on `texts` into `run`, or go on with it. minutes: stop after so many.

    Raises TextInvalid, RunInvalid, ConfigInvalid where texts, run or device are not what they must be.
    """
    logging.disable_progress_bar()  # one of ours is enough
    chosen = _device(device)
    train_texts, validation_texts = texts_of(texts, "train"), texts_of(texts, "validation")
    if resume:
        tokenizer = load_tokenizer(run)
    else:
        print("Learning the vocabulary.", file=sys.stderr)
        tokenizer = train_tokenizer(train_texts, config.vocabulary)
    print("Tokenizing.", file=sys.stderr)
    train_ids, validation_ids = (tokenized(tokenizer, of) for of in (train_texts, validation_texts))
    check_length(train_ids, config, "train")
    check_length(validation_ids, config, "validation")
    tell_imitated(config.precision, torch.device(chosen))
    trainer = Trainer(config, tokenizer, train_ids, validation_ids, run, device=chosen, resume=resume)
    trainer.fit(minutes)
    return trainer


def tokenized(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> Ids:
    """Token ids by domain."""
    return {domain: ids_of(tokenizer, text) for domain, text in texts.items()}


def load_tokenizer(run: Path) -> Any:
    """The tokenizer of a run. Raises RunInvalid where there is none."""
    try:
        return AutoTokenizer.from_pretrained(run)
    except (OSError, ValueError) as error:
        raise RunInvalid(
            f"{run} holds no tokenizer: {str(error).splitlines()[0]}",
            remedy="Give a folder made by `specmoe reference-moe train`.",
        ) from error


def _device(name: str) -> str:
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigInvalid(
            f"device is {name}: {str(error).splitlines()[0]}", remedy="Set --device cpu, or another one."
        ) from error
    return chosen
