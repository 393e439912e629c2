"""From an export to a version: whatever is wrong with it, nothing is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_store.documents import MAX_DOCUMENT_BYTES, written
from model_store.errors import FileRefused, ManifestInvalid, StoreUnavailable
from model_store.store import open_store
from speculation.errors import GoldenMismatch, GraphRefused
from speculation.publishing import publish_export
from tests.toy_version import toy_version


@pytest.fixture(params=[False, True], ids=["predict and advance", "with steps"])
def export(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    draft, graphs = toy_version(steps=request.param)
    for name, content in {"draft.json": written(draft), **graphs}.items():
        (folder / name).write_bytes(content)
    return folder


def change_draft(export: Path, **changes) -> None:
    path = export / "draft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_export_becomes_the_next_version(export, tmp_path):
    store = open_store(tmp_path / "store")
    publish_export(export, store)
    assert publish_export(export, store, aliases=["production"]).version == 2
    assert store.aliases("toy") == {"production": 2}
    graphs = {path.name: path.read_bytes() for path in export.glob("*.onnx")}
    assert store.load("toy", 2).graphs == graphs


@pytest.mark.parametrize("name", ["draft.json", "predict.onnx", "advance.onnx"])
def test_a_missing_file_is_named(export, tmp_path, name):
    (export / name).unlink()
    refused(export, tmp_path, FileRefused, rf"export/{name} is missing.*as export writes it")


@pytest.mark.parametrize("name", ["begin.onnx", "step.onnx"])
def test_a_missing_step_is_named(export, tmp_path, name):
    if (export / name).exists():
        (export / name).unlink()
        refused(export, tmp_path, FileRefused, rf"export/{name} is missing.*as export writes it")


@pytest.mark.parametrize("name", ["predict.onnx", "advance.onnx"])
def test_a_cut_graph_is_named(export, tmp_path, name):
    (export / name).write_bytes((export / name).read_bytes()[:200])
    refused(export, tmp_path, GraphRefused, rf"export/{name} is no graph")


def test_a_wrong_draft_is_named(export, tmp_path):
    change_draft(export, opset=0)
    refused(export, tmp_path, ManifestInvalid, r"export/draft\.json: opset: .*came 0")


def test_a_huge_draft_is_not_read(export, tmp_path):
    with (export / "draft.json").open("ab") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    refused(export, tmp_path, FileRefused, r"draft\.json has \d+ bytes, expected \d+ at most")


def test_another_answer_than_promised_is_refused(export, tmp_path):
    change_draft(export, golden=[[0.0] * 8] * 4)
    refused(export, tmp_path, GoldenMismatch, r"export predicts 0\.\d+ for layer")


def refused(export: Path, tmp_path: Path, error: type[Exception], reason: str) -> None:
    store = open_store(tmp_path / "store")
    with pytest.raises(error, match=reason):
        publish_export(export, store)
    with pytest.raises(StoreUnavailable):
        store.models()
