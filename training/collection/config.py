"""What to record: the options of `specmoe collect` that decide what ends up in the traces, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.errors import ConfigInvalid

# Of a piece, where nobody says and the model can read as many.
USUAL_LENGTH = 512


@dataclass(frozen=True)
class CollectConfig:
    """What to record.

    texts: files of running text. prompts: a file of prompts instead.
    domain: of everything; where None, file names and the prompts say.
    length: tokens of a piece of text, or of a prompt at most. new_tokens: how many to generate behind each.
    tokens: stop with the sequence that reaches so many recorded ones, all stacks together; None: at the end.
    batch_size: sequences side by side. hidden: whether to keep what the routers see.
    """

    texts: tuple[Path, ...] = ()
    prompts: Path | None = None
    domain: str | None = None
    length: int = USUAL_LENGTH
    new_tokens: int = 0
    tokens: int | None = None
    batch_size: int = 8
    hidden: bool = False

    def __post_init__(self) -> None:
        for field, least in (("length", 2), ("new_tokens", 0), ("tokens", 1), ("batch_size", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ConfigInvalid(f"{field} is {value}, expected {least} or more.", remedy="Correct it.")
        if bool(self.texts) == (self.prompts is not None):
            raise ConfigInvalid(
                "There are texts and prompts, or neither.", remedy="Give text files, or a file of prompts."
            )
