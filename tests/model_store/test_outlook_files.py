"""A version may have an outlook; one that has none is written and read as it always was."""

from pathlib import Path

import pytest

from model_store.documents import complete, written
from model_store.manifest import OUTLOOK
from model_store.store import open_store
from tests.toy_version import toy_version


def test_an_outlook_is_stored_and_loaded(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    draft, graphs = toy_version(outlook=True)
    store.publish(draft, graphs)
    loaded = store.load("toy", 1)
    assert loaded.manifest.outlook == draft.outlook
    assert loaded.graphs[OUTLOOK] == graphs[OUTLOOK]


def test_a_manifest_without_one_does_not_mention_it() -> None:
    assert b'"outlook"' not in written(toy_version()[0])
    assert b'"outlook"' in written(toy_version(outlook=True)[0])


@pytest.mark.parametrize("outlook", [True, False], ids=["no file", "no description"])
def test_file_and_description_belong_together(outlook: bool) -> None:
    draft, _ = toy_version(outlook=outlook)
    _, other = toy_version(outlook=not outlook)
    with pytest.raises(ValueError, match=r"outlook\.onnx and its description belong together"):
        complete(draft, 1, other)


def test_its_golden_answer_follows_the_spec() -> None:
    draft, graphs = toy_version(outlook=True)
    assert draft.outlook is not None
    short = draft.outlook.model_copy(update={"golden": draft.outlook.golden[:-1]})
    with pytest.raises(ValueError, match=r"outlook\.golden must be 4 x 8"):
        complete(draft.model_copy(update={"outlook": short}), 1, graphs)
