"""Texts for the reference model: split by document, cut into sections, repeats left out, what is refused."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.reference_moe.corpus import write_corpus, write_split_corpus
from training.errors import TextInvalid
from training.reference_moe import packages
from training.reference_moe.markup import manual_page, plain, web_page
from training.reference_moe.packages import Source, package_documents
from training.reference_moe.texts import SPLITS, Document, folder_documents, texts_of, write_texts


def parts_of(texts: Path, domain: str) -> dict[str, str]:
    return {split: texts_of(texts, split)[domain] for split in SPLITS}


def test_every_document_falls_into_one_split_as_a_whole(tmp_path: Path) -> None:
    texts = write_split_corpus(tmp_path)
    for domain in ("code", "prose"):
        parts = parts_of(texts, domain)
        for number in range(8):
            (whole,) = [part for part in parts.values() if f"{number}: " in part]
            document = (tmp_path / "corpus" / domain / f"part-{number}.txt").read_text(encoding="utf-8")
            assert document.strip() in whole
        assert all(parts.values())


def test_documents_of_the_same_name_fall_into_the_same_split_in_every_domain(tmp_path: Path) -> None:
    texts = write_split_corpus(tmp_path)
    places = {
        domain: {
            number: split
            for split, part in parts_of(texts, domain).items()
            for number in range(8)
            if f"{number}: " in part
        }
        for domain in ("code", "prose")
    }
    assert places["code"] == places["prose"]


def test_a_long_document_is_shared_out_by_section_and_a_repeated_paragraph_kept_once(tmp_path: Path) -> None:
    licence = "Permission is granted to whoever reads this to read it again, and again. " * 3
    paragraphs = [f"Word {number}. " + f"number {number} " * 400 for number in range(60)]
    document = Document("book", "\n\n".join(f"{licence}\n\n{paragraph}" for paragraph in paragraphs))
    counts = write_texts([("book", iter([document]))], tmp_path, 1_000_000)
    together = "".join(parts_of(tmp_path, "book").values())
    assert together.count("Permission is granted") == 3
    assert all(together.count(f"Word {number}. ") == 1 for number in range(60))
    assert counts["book"]["train"] > counts["book"]["test"] > 0


@given(st.integers(1_000, 60_000))
def test_a_domain_has_no_more_than_it_may_but_a_section(most: int) -> None:
    from tempfile import TemporaryDirectory

    documents = [Document(f"page {n}", f"{n} is the number of this page. " * 40) for n in range(60)]
    longest = max(len(document.text) for document in documents)
    with TemporaryDirectory() as folder:
        counts = write_texts([("pages", iter(documents))], Path(folder), most)["pages"]
    assert counts["train"] < most + longest
    assert counts["test"] < most * 0.05 + longest


def test_what_is_there_is_not_overwritten_and_what_fails_leaves_nothing(tmp_path: Path) -> None:
    texts = write_split_corpus(tmp_path)
    before = parts_of(texts, "code")
    with pytest.raises(TextInvalid, match="holds texts already"):
        write_texts(folder_documents(tmp_path / "corpus"), texts, 1_000)
    assert parts_of(texts, "code") == before
    (tmp_path / "corpus" / "small").mkdir()
    (tmp_path / "corpus" / "small" / "one.txt").write_text("Alone. " * 50)
    with pytest.raises(
        TextInvalid, match="Domain small has 1 documents of 200 characters or more, expected 3"
    ):
        write_texts(folder_documents(tmp_path / "corpus"), tmp_path / "new", 1_000)
    assert list((tmp_path / "new").iterdir()) == []


def test_bad_folders_and_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(TextInvalid, match="nowhere is not a folder"):
        list(folder_documents(tmp_path / "nowhere"))
    with pytest.raises(TextInvalid, match="There is no domain"):
        write_texts(iter(()), tmp_path / "out", 1_000)
    with pytest.raises(TextInvalid, match="holds no texts"):
        texts_of(tmp_path, "train")
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "code" / "part-3.txt").write_bytes(b"caf\xe9" * 100)
    with pytest.raises(TextInvalid, match=r"part-3\.txt cannot be read: byte 3 is not UTF-8"):
        write_texts(folder_documents(corpus), tmp_path / "out", 1_000)


@pytest.mark.parametrize(
    ("roff", "said"),
    [
        ('.\\" A comment\n.TH LS 1\n.SH NAME\nls \\- list\n', "NAME\nls - list\n"),
        (".SH SYNOPSIS\n.B ls\n.RI [ file ]\n.PP\n\\fBBold\\fP and \\f[I]so\\f[] on\\&.\n",
         "SYNOPSIS\nls\n[ file ]\n\nBold and so on.\n"),
        (".ie n .ds Aq \\(aq\nIt\\(aqs \\s-1BIG\\s0\\(em\n", "It's BIG—\n"),
    ],
    ids=["heading", "fonts", "characters"],
)  # fmt: skip
def test_a_manual_page_says_what_a_reader_sees(roff: str, said: str) -> None:
    assert manual_page(roff) == said


def test_a_web_page_shows_its_text_alone() -> None:
    page = "<head><title>no</title></head><p>One\n  &amp; two</p><script>x</script><pre>a\n  b</pre>"
    assert web_page(page) == "One & two\n\na\n  b\n"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of manual pages, made by dpkg-deb, and an apt-get that hands it out, once."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("there is no dpkg-deb")
    source = tmp_path / "source"
    pages = source / "usr/share/man/xx/man1"
    pages.mkdir(parents=True)
    for number in range(5):
        with gzip.open(pages / f"page{number}.1.gz", "wt", encoding="utf-8") as file:
            file.write(f".SH PAGE {number}\n" + f"Zeile für Seite {number}.\n" * 30)
    (source / "DEBIAN").mkdir()
    (source / "DEBIAN/control").write_text(
        "Package: manpages-xx\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: pages\n"
    )
    built = tmp_path / "manpages-xx_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(source), str(built)], check=True, capture_output=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    failing = "echo 'E: Unable to fetch' >&2; exit 100"
    (programs / "apt-get").write_text(f"#!/bin/sh\nmv {built} . || {{ {failing}; }}\n")
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return built


def sources(pattern: str) -> tuple[Source, ...]:
    return (Source("manual-xx", "manpages-xx", pattern, manual_page, "none"),)


@pytest.mark.usefixtures("archive")
def test_a_package_is_downloaded_once_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "SOURCES", sources("usr/share/man/xx/man*/*.gz"))
    for out in ("first", "second"):
        write_texts(package_documents(tmp_path / "cache"), tmp_path / out, 10_000)
    assert parts_of(tmp_path / "first", "manual-xx") == parts_of(tmp_path / "second", "manual-xx")
    assert "Zeile für Seite" in texts_of(tmp_path / "first", "train")["manual-xx"]


@pytest.mark.usefixtures("archive")
def test_a_package_that_holds_something_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "SOURCES", sources("usr/share/info/*.gz"))
    with pytest.raises(TextInvalid, match=r"manpages-xx holds no usr/share/info/\*\.gz"):
        write_texts(package_documents(tmp_path / "cache"), tmp_path / "out", 10_000)


def test_a_failing_download_and_a_missing_apt_are_told(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.unlink()
    with pytest.raises(TextInvalid, match="manpages-xx cannot be had: E: Unable to fetch"):
        packages.unpacked("manpages-xx", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TextInvalid, match=r"there is no apt-get here\. Use Debian .* --from FOLDER"):
        packages.unpacked("manpages-xx", tmp_path / "cache")


def test_sources_are_one_domain_each() -> None:
    assert len({source.domain for source in packages.SOURCES}) == len(packages.SOURCES)
    assert plain("as it is") == "as it is"
