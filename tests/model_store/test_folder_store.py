"""A folder store: atomic, and blind to what a crash left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model_store.errors import PublishConflict, StoreUnavailable
from model_store.folder import LEFTOVER_SECONDS, MAX_ATTEMPTS, TEMPORARY
from model_store.store import open_store

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_publishing_leaves_nothing_but_the_version(root, toys):
    open_store(root).publish(*toys[0])
    assert [path.name for path in (root / "toy").iterdir()] == ["1"]
    assert sorted(path.name for path in (root / "toy" / "1").iterdir()) == [
        "advance.onnx",
        "manifest.json",
        "predict.onnx",
    ]


def test_a_failed_publication_leaves_no_trace(root, toys, monkeypatch):
    store = open_store(root)
    store.publish(*toys[0])
    monkeypatch.setattr(os, "fsync", _full_disk)
    with pytest.raises(StoreUnavailable, match="No space left"):
        store.publish(*toys[1])
    assert [path.name for path in (root / "toy").iterdir()] == ["1"]


def test_a_publisher_killed_in_the_middle_leaves_no_version(root, toys):
    open_store(root).publish(*toys[0])
    _publish_and_die(root)
    store = open_store(root)
    assert list((root / "toy").glob(f"{TEMPORARY}*"))
    assert store.versions("toy") == [1]
    assert store.publish(*toys[1]).version == 2


def test_old_leftovers_are_cleaned_and_young_ones_are_left(root, toys):
    old, young = (root / "toy" / f"{TEMPORARY}{age}" for age in ("old", "young"))
    for leftover in (old, young):
        leftover.mkdir(parents=True)
        (leftover / "predict.onnx").write_bytes(b"half")
    then = time.time() - LEFTOVER_SECONDS - 60
    os.utime(old, (then, then))
    open_store(root).publish(*toys[0])
    assert not old.exists()
    assert young.exists()


def test_a_number_taken_meanwhile_is_skipped(root, toys, monkeypatch):
    store = open_store(root)
    store.publish(*toys[0])
    store.publish(*toys[0])
    # Two others published between our look at the numbers and our rename.
    monkeypatch.setattr(store, "_numbers", lambda model: [])
    assert store.publish(*toys[1]).version == 3


def test_a_storm_of_publishers_ends_in_an_error(root, toys, monkeypatch):
    store = open_store(root)
    for _ in range(MAX_ATTEMPTS):
        store.publish(*toys[0])
    monkeypatch.setattr(store, "_numbers", lambda model: [])
    with pytest.raises(PublishConflict, match=r"Versions 1 to 10 of toy were taken"):
        store.publish(*toys[1])


def test_foreign_files_and_folders_are_no_versions(root, toys):
    store = open_store(root)
    store.publish(*toys[0])
    for name in ("0", "01", "latest", "-1", ".git", "1.bak"):
        (root / "toy" / name).mkdir()
    (root / "toy" / "5").write_text("a file")
    (root / "README.md").write_text("a file")
    (root / "no-versions").mkdir()
    assert (store.models(), store.versions("toy")) == (["toy"], [1])


@pytest.mark.parametrize("ask", [lambda store: store.models(), lambda store: store.versions("toy")])
def test_a_store_that_is_not_there_says_so(tmp_path, ask):
    with pytest.raises(StoreUnavailable, match=r"There is no store at .*nowhere.*publish to it"):
        ask(open_store(tmp_path / "nowhere"))


def test_a_store_that_is_a_file_says_so(tmp_path, toys):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        open_store(tmp_path / "store").publish(*toys[0])


def _full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def _publish_and_die(root: Path) -> None:
    """In another process: publish, and be gone the moment before the version gets its name."""
    code = (
        "import os, pathlib\n"
        "from model_store.store import open_store\n"
        "from tests.toy_version import toy_version\n"
        "pathlib.Path.rename = lambda *_: os._exit(9)\n"
        f"open_store({str(root)!r}).publish(*toy_version())"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 9
