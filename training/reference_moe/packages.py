"""Documents of several kinds and languages from Debian packages, which anyone may download and redistribute.

    specmoe reference-moe texts --out runs/texts

`apt-get download` and `dpkg-deb --extract` into a folder of ours; nothing is installed, no root is needed.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess  # apt-get and dpkg-deb, by name, without a shell
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.errors import TextInvalid
from training.reference_moe.markup import manual_page, plain, web_page
from training.reference_moe.texts import Document

# No file of a package is larger: what a damaged one unpacks to is bounded.
MAX_DOCUMENT_BYTES = 64 << 20
OWN = "or give your own texts: --from FOLDER, a folder in it for each domain"


@dataclass(frozen=True)
class Source:
    """Where a domain's documents are: files of a package that match `pattern`, and what reads them."""

    domain: str
    package: str
    pattern: str
    read: Callable[[str], str]
    licence: str


SOURCES = (
    Source("dictionary", "dict-gcide", "usr/share/dictd/gcide.dict.dz", plain, "GPL-2+"),
    Source("jargon", "dict-jargon", "usr/share/dictd/jargon.dict.dz", plain, "public domain"),
    Source(
        "handbook",
        "debian-handbook",
        "usr/share/doc/debian-handbook/html/en-US/*.html",
        web_page,
        "GPL-2+ or CC-BY-SA-3.0",
    ),
    Source("manual-de", "manpages-de", "usr/share/man/de/man*/*.gz", manual_page, "GPL-3+ and each page's"),
    Source("manual-fr", "manpages-fr", "usr/share/man/fr/man*/*.gz", manual_page, "GPL-3+ and each page's"),
    Source("manual-ja", "manpages-ja", "usr/share/man/ja/man*/*.gz", manual_page, "each page's own"),
    Source("manual-ru", "manpages-ru", "usr/share/man/ru/man*/*.gz", manual_page, "GPL-3+ and each page's"),
    Source(
        "python-doc", "python3.11-doc", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt", plain, "PSF-2"
    ),
    Source("perl-doc", "perl-doc", "usr/share/perl/5.*/pod/*.pod", plain, "GPL-1+ or Artistic"),
    Source("python-code", "libpython3.11-stdlib", "usr/lib/python3.11/**/*.py", plain, "PSF-2"),
)


def package_documents(cache: Path) -> Iterator[tuple[str, Iterator[Document]]]:
    """Each domain and its documents. cache: where packages are downloaded to, once, and unpacked.

    Raises TextInvalid where a package cannot be had or holds nothing of what is looked for.
    """
    for source in SOURCES:
        yield source.domain, _documents(source, unpacked(source.package, cache))


def unpacked(package: str, cache: Path) -> Path:
    """The folder that holds what a Debian package holds, downloaded where it is not there yet."""
    folder = cache / package
    if folder.is_dir():
        return folder
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise TextInvalid(
                f"{package} cannot be had: there is no {program} here.",
                remedy=f"Use Debian or Ubuntu, {OWN}.",
            )
    cache.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", "--quiet", package], package, cache)
    archives = sorted(cache.glob(f"{package}_*.deb"))
    unpacking = cache / f"{package}.unpacking"
    shutil.rmtree(unpacking, ignore_errors=True)
    _run(["dpkg-deb", "--extract", archives[-1].name, unpacking.name], package, cache)
    return unpacking.rename(folder)


def _run(command: list[str], package: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason told"])[-1]
        raise TextInvalid(
            f"{package} cannot be had: {said}",
            remedy=f"Check the network, run apt-get update, {OWN}.",
        )


def _documents(source: Source, folder: Path) -> Iterator[Document]:
    files = sorted(file for file in folder.glob(source.pattern) if file.is_file() and not file.is_symlink())
    if not files:
        raise TextInvalid(
            f"{source.package} holds no {source.pattern}: it is another version than the ones known.",
            remedy=f"Choose the release whose packages docs/reference-moe.md lists, {OWN}.",
        )
    for file in files:
        # The same page has the same name in every language: all of its translations fall into one split.
        yield Document(file.name, source.read(_content(file)))


def _content(file: Path) -> str:
    if file.suffix in (".gz", ".dz"):
        with gzip.open(file) as stream:
            content = stream.read(MAX_DOCUMENT_BYTES)
    else:
        with file.open("rb") as stream:
            content = stream.read(MAX_DOCUMENT_BYTES)
    return content.decode("utf-8", errors="replace")
