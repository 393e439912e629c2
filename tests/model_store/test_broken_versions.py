"""A version that is not what was published is refused with the reason, and the others go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_store import documents
from model_store.errors import ChecksumMismatch, FileRefused, ManifestInvalid, VersionBroken
from model_store.manifest import PREDICT
from model_store.store import Store, broken, open_store


@pytest.fixture
def root(tmp_path: Path, toys) -> Path:
    store = open_store(tmp_path / "store")
    for toy in toys:
        store.publish(*toy)
    store.set_alias("toy", "production", 2)
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Store:
    return open_store(root)


@pytest.mark.parametrize("name", ["predict.onnx", "advance.onnx"])
def test_a_changed_byte_is_noticed(root, store, name):
    path = root / "toy" / "1" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumMismatch, match=rf"1/{name} has sha256 \w+, its manifest promises sha256 \w+"):
        store.load("toy", 1)


@pytest.mark.parametrize("size", [0, 10])
def test_a_cut_file_is_noticed(root, store, size):
    path = root / "toy" / "1" / "predict.onnx"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ChecksumMismatch, match=rf"has {size} bytes, its manifest promises \d+ bytes"):
        store.load("toy", 1)


@pytest.mark.parametrize("name", ["predict.onnx", "advance.onnx", "manifest.json"])
def test_a_missing_file_is_named(root, store, name):
    (root / "toy" / "1" / name).unlink()
    with pytest.raises(FileRefused, match=rf"1/{name} is missing"):
        store.load("toy", 1)


def test_a_file_above_the_limit_is_not_read(root, store, monkeypatch):
    monkeypatch.setattr("model_store.folder.MAX_FILE_BYTES", 100)
    with pytest.raises(FileRefused, match="no regular file of at most 100 bytes"):
        store.load("toy", 1)


def test_a_manifest_above_the_limit_is_not_read(root, store):
    with (root / "toy" / "1" / "manifest.json").open("ab") as file:
        file.truncate(documents.MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(FileRefused, match=r"manifest\.json is no regular file of at most"):
        store.manifest("toy", 1)


def test_a_folder_in_the_place_of_a_file_is_refused(root, store):
    (root / "toy" / "1" / "predict.onnx").unlink()
    (root / "toy" / "1" / "predict.onnx").mkdir()
    with pytest.raises(FileRefused, match="no regular file"):
        store.load("toy", 1)


@pytest.mark.parametrize("linked", ["1/predict.onnx", "1/manifest.json", "1", "aliases.json"])
def test_a_link_out_of_the_store_is_refused(root, store, tmp_path, linked):
    path, outside = root / "toy" / linked, tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(FileRefused, match="outside the store"):
        (store.load("toy", 1), store.aliases("toy"))


def test_a_link_within_the_store_is_followed(root, store):
    path = root / "toy" / "1" / "predict.onnx"
    path.rename(root / "blob")
    path.symlink_to(root / "blob")
    assert store.load("toy", 1).graphs[PREDICT] == (root / "blob").read_bytes()


def test_a_version_copied_under_another_number_is_refused(root, store):
    (root / "toy" / "1").rename(root / "toy" / "7")
    with pytest.raises(ManifestInvalid, match="is of toy version 1, but lies where toy version 7 belongs"):
        store.load("toy", 7)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"production": "2"}', "production: Input should be a valid integer, came '2'"),
        (b'{"production": 0}', "expected names that point to versions from 1"),
        (b'{"../x": 1}', "expected names that point to versions from 1"),
    ],
)
def test_broken_aliases_are_told(root, store, content, reason):
    (root / "toy" / "aliases.json").write_bytes(content)
    with pytest.raises(ManifestInvalid, match=rf"toy/aliases\.json.*{reason}"):
        store.resolve("toy")


def test_an_alias_never_moves_to_a_broken_version(root, store):
    (root / "toy" / "1" / "advance.onnx").write_bytes(b"x")
    with pytest.raises(VersionBroken):
        store.set_alias("toy", "production", 1)
    assert store.aliases("toy") == {"production": 2}


def test_one_broken_version_leaves_the_others_alone(root, store):
    (root / "toy" / "1" / "manifest.json").write_text("{}")
    assert store.models() == ["toy"]
    assert store.versions("toy") == [1, 2]
    assert store.load("toy", 2).manifest.version == 2


def test_everything_wrong_is_found_at_once(root, store):
    (root / "toy" / "1" / "predict.onnx").write_bytes(b"x")
    (root / "toy" / "aliases.json").write_text(json.dumps({"production": 9, "candidate": 2}))
    assert [what for what, _ in broken(store, "toy")] == ["1", "production"]


def test_unreadable_aliases_are_found_too(root, store):
    (root / "toy" / "aliases.json").write_text("{")
    assert [what for what, _ in broken(store, "toy")] == ["aliases"]
