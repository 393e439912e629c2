"""Texts by domain, split by document: OUT/{train,validation,test}/DOMAIN.txt.

    specmoe reference-moe texts --out runs/texts [--from FOLDER]

A document is a file, or a section of a long one. Which split it falls into follows from its name, so that all
translations of a page fall into the same. Paragraphs seen before in a domain (licences, say) are left out.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.errors import TextInvalid

SPLITS = ("train", "validation", "test")
# Share of the documents that goes to each split outside training.
HELD_OUT_SHARE = 0.05
# Longer documents are cut into sections at an empty line.
SECTION_CHARACTERS = 20_000
# Shorter paragraphs repeat by nature.
DUPLICATE_CHARACTERS = 80
# Shorter documents are stubs: a line that names another page.
SHORTEST_DOCUMENT = 200
REMEDY = "Give a folder with a folder for each domain, and text files in UTF-8 in those."


@dataclass(frozen=True)
class Document:
    """A text that falls into one split as a whole. name: what decides which."""

    name: str
    text: str


def write_texts(
    domains: Iterable[tuple[str, Iterator[Document]]], out: Path, domain_characters: int
) -> dict[str, dict[str, int]]:
    """Split the documents of each domain into files below `out`. Returns characters by domain and split.

    domain_characters: of a domain's training texts, more or less; documents beyond are left out.

    Raises TextInvalid where `out` has texts already, or a domain has too few documents for three splits; then
    nothing is left in `out`.
    """
    if any((out / split).exists() for split in SPLITS):
        raise TextInvalid(
            f"{out} holds texts already.", remedy="Choose another --out, or use those that are there."
        )
    writing = out / "writing"
    shutil.rmtree(writing, ignore_errors=True)
    for split in SPLITS:
        (writing / split).mkdir(parents=True)
    counts = {}
    try:
        for domain, documents in domains:
            parts = _split(domain, documents, domain_characters)
            for split, texts in parts.items():
                (writing / split / f"{domain}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
            counts[domain] = {split: sum(map(len, texts)) for split, texts in parts.items()}
        if not counts:
            raise TextInvalid("There is no domain.", remedy=REMEDY)
        for split in SPLITS:
            (writing / split).rename(out / split)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return counts


def folder_documents(folder: Path) -> Iterator[tuple[str, Iterator[Document]]]:
    """Each folder in `folder` as a domain, with its files, those in folders below it included.

    Raises TextInvalid where there is none, or a file is no text in UTF-8.
    """
    if not folder.is_dir():
        raise TextInvalid(f"{folder} is not a folder.", remedy=REMEDY)
    for domain in sorted(path for path in folder.iterdir() if path.is_dir()):
        yield domain.name, _read_all(domain)


def texts_of(folder: Path, split: str) -> dict[str, str]:
    """Text by domain, of what `write_texts` wrote. Raises TextInvalid where it did not."""
    files = sorted((folder / split).glob("*.txt"))
    if not files:
        raise TextInvalid(
            f"{folder / split} holds no texts.",
            remedy="Run `specmoe reference-moe texts` into that folder first.",
        )
    return {file.stem: _read(file) for file in files}


def _read_all(domain: Path) -> Iterator[Document]:
    for file in sorted(domain.rglob("*")):
        if file.is_file():
            yield Document(str(file.relative_to(domain)), _read(file))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        reason = (
            f"byte {error.start} is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        )
        raise TextInvalid(f"{file} cannot be read: {reason}.", remedy=REMEDY) from error


def _split(domain: str, documents: Iterator[Document], most: int) -> dict[str, list[str]]:
    """Texts by split, in the order of their names' digests: what is held out keeps what training has, too."""
    sections = sorted((_place(of.name), of.text) for document in documents for of in _sections(document))
    seen: set[bytes] = set()
    kept = [(place, text) for place, whole in sections if (text := _without_repeats(whole, seen))]
    kept = [(place, text) for place, text in kept if len(text) >= SHORTEST_DOCUMENT]
    if len(kept) < len(SPLITS):
        raise TextInvalid(
            f"Domain {domain} has {len(kept)} documents of {SHORTEST_DOCUMENT} characters or more, expected"
            f" {len(SPLITS)} at least.",
            remedy="Give it more files, or longer ones; training, validation and test need one each.",
        )
    test = max(1, sum(place < HELD_OUT_SHARE for place, _ in kept))
    behind = max(test + 1, sum(place < 2 * HELD_OUT_SHARE for place, _ in kept))
    behind = min(behind, len(kept) - 1)
    texts = [text for _, text in kept]
    return {
        "train": _up_to(texts[behind:], most),
        "validation": _up_to(texts[min(test, behind - 1) : behind], most * HELD_OUT_SHARE),
        "test": _up_to(texts[: min(test, behind - 1)], most * HELD_OUT_SHARE),
    }


def _up_to(texts: list[str], characters: float) -> list[str]:
    """The first texts, until they have so many characters; one at least."""
    sizes = itertools.accumulate(map(len, texts))
    return [text for text, size in zip(texts, sizes, strict=True) if size - len(text) < characters]


def _place(name: str) -> float:
    """A number from 0 to 1 that follows from the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / (1 << 56)


def _sections(document: Document) -> Iterator[Document]:
    """A long document in parts that end at an empty line, with a name each."""
    held: list[str] = []
    size = number = 0
    for paragraph in document.text.split("\n\n"):
        held.append(paragraph)
        size += len(paragraph)
        if size >= SECTION_CHARACTERS:
            yield Document(f"{document.name} {number}", "\n\n".join(held))
            held, size, number = [], 0, number + 1
    if held:
        # A short document keeps its name, and with it its translations' split.
        yield Document(f"{document.name} {number}" if number else document.name, "\n\n".join(held))


def _without_repeats(text: str, seen: set[bytes]) -> str:
    """The text without long paragraphs that are in `seen`, which is added to."""
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= DUPLICATE_CHARACTERS:
            digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept).strip()
