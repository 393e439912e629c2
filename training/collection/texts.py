"""Turns text files and prompts into sequences of token ids, each with the domain it came from.

    specmoe collect MODEL --text novel.txt law.txt --length 512 --out traces/
    specmoe collect MODEL --prompts prompts.jsonl --generate 256 --out traces/

A text file is one running text, cut into pieces; its domain is its name without the extension. A prompts file
has a prompt on each line, or is JSON lines: {"prompt": "...", "domain": "..."}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.trace import MAX_DOMAIN_LENGTH, UNKNOWN_DOMAIN
from training.errors import TextInvalid

# Characters that are tokenized at a time: a text may be larger than memory.
BLOCK_CHARACTERS = 1 << 20
JSON_LINES = ".jsonl"


@dataclass(frozen=True)
class Text:
    """One sequence: token ids as the model reads them, special ones included."""

    token_ids: tuple[int, ...]
    domain: str


class Tokens:
    """Token ids of texts, framed as the tokenizer frames them (a token before or behind, say)."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer = tokenizer
        plain, framed = self.of("a"), list(tokenizer("a").input_ids)
        at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
        self._before, self._behind = framed[:at], framed[at + len(plain) :]
        self.length = max(1, length - len(self._before) - len(self._behind))

    def of(self, text: str) -> list[int]:
        """The ids of a text without any special tokens around it."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def framed(self, ids: Sequence[int], domain: str) -> Text:
        return Text((*self._before, *ids, *self._behind), domain)


def texts_of(files: Sequence[Path], tokens: Tokens, domain: str | None) -> Iterator[Text]:
    """Pieces of running texts, one file after another. A file's last is shorter, of two tokens at least.

    domain: of all; each file's name where None. Raises TextInvalid where a file is no text in UTF-8.
    """
    for file in files:
        named = domain or _domain_of(file)
        held: list[int] = []
        for block in _blocks(file):
            held += tokens.of(block)
            whole = len(held) - len(held) % tokens.length
            for start in range(0, whole, tokens.length):
                yield tokens.framed(held[start : start + tokens.length], named)
            held = held[whole:]
        if len(held) > 1:
            yield tokens.framed(held, named)


def prompts_of(file: Path, tokens: Tokens, domain: str | None) -> Iterator[Text]:
    """The prompts of a file, cut to the length allowed; empty lines are left out.

    Raises TextInvalid with the line where one is not what it should be.
    """
    named = domain or (UNKNOWN_DOMAIN if file.suffix == JSON_LINES else _domain_of(file))
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        prompt, of = (line, named) if file.suffix != JSON_LINES else _parsed(file, number, line, named)
        ids = tokens.of(prompt.strip())[: tokens.length]
        if ids:
            yield tokens.framed(ids, domain or of)


def sha256_of(files: Sequence[Path]) -> str:
    """What tells whether texts are the same: of one file, or of the digests of several, in hex."""
    digests = []
    for file in files:
        try:
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise _unreadable(file, error.strerror or str(error)) from error
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _domain_of(file: Path) -> str:
    return "".join(c if c.isprintable() else "_" for c in file.stem)[:MAX_DOMAIN_LENGTH] or UNKNOWN_DOMAIN


def _blocks(file: Path) -> Iterator[str]:
    """The text in pieces that end behind a line or a word where there is one."""
    held = ""
    for part in _read(file):
        held += part
        cut = max(held.rfind("\n"), held.rfind(" ")) + 1 or len(held)
        yield held[:cut]
        held = held[cut:]
    if held:
        yield held


def _read(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as stream:
            while part := stream.read(BLOCK_CHARACTERS):
                yield part
    except UnicodeDecodeError as error:
        raise _unreadable(file, f"byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise _unreadable(file, error.strerror or str(error)) from error


def _lines(file: Path) -> Iterator[str]:
    held = ""
    for part in _read(file):
        *lines, held = (held + part).split("\n")
        yield from lines
    yield held


def _parsed(file: Path, number: int, line: str, domain: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TextInvalid(
            f"{file}, line {number} is no JSON: {error}.", remedy='Write {"prompt": "..."} on each line.'
        ) from error
    prompt, of = (row.get("prompt"), row.get("domain", domain)) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str) or not isinstance(of, str) or not (0 < len(of) <= MAX_DOMAIN_LENGTH):
        raise TextInvalid(
            f"{file}, line {number}: expected an object with a string `prompt` and perhaps a name, `domain`.",
            remedy='Write {"prompt": "...", "domain": "..."} on each line.',
        )
    return prompt, of


def _unreadable(file: Path, reason: str) -> TextInvalid:
    return TextInvalid(f"{file} cannot be read: {reason}.", remedy="Give text files in UTF-8.")
