"""`specmoe store` and `specmoe publish`, through the front door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_store.documents import written
from model_store.store import open_store
from specmoe.cli import main
from tests.toy_version import toy_store, toy_version


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SPECMOE_STORE", raising=False)
    return toy_store(tmp_path)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    draft, graphs = toy_version()
    for name, content in {"draft.json": written(draft), **graphs}.items():
        (folder / name).write_bytes(content)
    return folder


def test_list_has_a_line_for_each_version(root, capsys):
    assert main(["store", "list", "--store", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{root}: 2 versions"
    assert [line.split()[:3] for line in lines[1:]] == [["toy", "1", "toy,"], ["toy", "2", "production"]]


def test_list_tells_what_is_broken_beside_what_is_not(root, capsys):
    (root / "toy" / "1" / "manifest.json").write_text("{")
    assert main(["store", "list", "--store", str(root)]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "BROKEN: " in first and "manifest.json: Invalid JSON" in first
    assert "BROKEN" not in second


def test_list_for_scripts(root, capsys):
    (root / "toy" / "1" / "manifest.json").write_text("{")
    assert main(["store", "list", "--json", "--store", str(root)]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert "Invalid JSON" in first["broken"]
    assert (second["model"], second["version"], second["aliases"], second["broken"]) == (
        "toy",
        2,
        ["production"],
        None,
    )


def test_show_tells_whether_it_has_learnt_from_the_validation_traces(root, capsys):
    draft, graphs = toy_version()
    lineage = draft.lineage.model_copy(update={"refit": True})
    open_store(root).publish(draft.model_copy(update={"lineage": lineage}), graphs)
    for version, told in (("3", True), ("2", False)):
        assert main(["store", "show", "toy", version, "--store", str(root)]) == 0
        assert ("on the validation traces, too" in capsys.readouterr().out) == told


def test_list_goes_on_where_aliases_are_unreadable(root, capsys):
    (root / "toy" / "aliases.json").write_text("[]")
    assert main(["store", "list", "--store", str(root)]) == 0
    assert capsys.readouterr().out.count("aliases.json") == 2


def test_the_environment_names_the_store(root, capsys, monkeypatch):
    monkeypatch.setenv("SPECMOE_STORE", str(root))
    assert main(["store", "list"]) == 0
    assert capsys.readouterr().out.startswith(str(root))


def test_the_option_goes_before_the_environment(root, capsys, monkeypatch):
    monkeypatch.setenv("SPECMOE_STORE", "/nowhere")
    assert main(["store", "list", "--store", str(root)]) == 0


@pytest.mark.parametrize(("selector", "version"), [([], 2), (["1"], 1), (["production"], 2)])
def test_show_tells_one_version(root, capsys, selector, version):
    assert main(["store", "show", "toy", *selector, "--store", str(root)]) == 0
    shown = capsys.readouterr().out
    assert f"version      {version}, created" in shown
    assert "4 layers x 8 experts, top 2" in shown


def test_show_for_scripts_is_the_manifest(root, capsys):
    assert main(["store", "show", "toy", "1", "--json", "--store", str(root)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        (root / "toy" / "1" / "manifest.json").read_text()
    )


def test_verify_of_a_sound_store(root, capsys):
    assert main(["store", "verify", "--store", str(root)]) == 0
    assert capsys.readouterr().out == f"{root}: 2 versions read, 0 problems\n"


@pytest.mark.parametrize("models", [[], ["toy"]])
def test_verify_fails_and_lists_what_is_broken(root, capsys, models):
    (root / "toy" / "1" / "predict.onnx").write_bytes(b"x")
    assert main(["store", "verify", *models, "--store", str(root)]) == 1
    shown = capsys.readouterr().out
    assert "BROKEN toy 1: " in shown and "predict.onnx has 1 bytes" in shown
    assert "BROKEN toy 2" not in shown


def test_verify_for_scripts(root, capsys):
    (root / "toy" / "2" / "advance.onnx").unlink()
    assert main(["store", "verify", "--json", "--store", str(root)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["checked"] == ["toy 1", "toy 2"]
    assert [(problem["model"], problem["what"]) for problem in found["broken"]] == [("toy", "2")]


def test_alias_moves_adds_and_removes(root, capsys):
    for arguments in (
        ["production", "1"],
        ["candidate", "2"],
        ["stable", "production"],
        ["candidate", "--remove"],
    ):
        assert main(["store", "alias", "toy", *arguments, "--store", str(root)]) == 0
    assert open_store(root).aliases("toy") == {"production": 1, "stable": 1}
    assert "toy: production -> version 1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["1", "--remove"]])
def test_alias_wants_a_version_or_removal(root, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(["store", "alias", "toy", "production", *arguments, "--store", str(root)])
    assert stop.value.code == 2
    assert "give a VERSION, or --remove" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["show", "other"], "No version of other in"),
        (["show", "toy", "9"], "toy has no version 9. Choose one of 1, 2, production."),
        (["show", "../toy"], "'../toy' is no model name"),
        (["alias", "toy", "Production", "1"], "'Production' cannot be an alias"),
        (["alias", "toy", "production", "9"], "toy has no version 9"),
        (["alias", "toy", "candidate", "--remove"], "toy has no alias 'candidate'"),
        (["verify", "other"], "No version of other in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_there_ends_with_a_message(root, capsys, arguments, reason):
    assert main(["store", *arguments, "--store", str(root)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("specmoe: ") and reason in told


def test_publish_makes_the_next_version_and_moves_the_aliases(root, export, capsys):
    asked = ["--store", str(root), "--alias", "production", "--alias", "candidate"]
    assert main(["publish", str(export), *asked]) == 0
    assert capsys.readouterr().out == f"Published toy version 3 as production, candidate to {root}\n"
    assert open_store(root).aliases("toy") == {"candidate": 3, "production": 3}


def test_publish_wants_to_be_told_where_to(export, capsys, monkeypatch):
    monkeypatch.setenv("SPECMOE_STORE", "/somewhere")
    with pytest.raises(SystemExit) as stop:
        main(["publish", str(export)])
    assert stop.value.code == 2
    assert "--store" in capsys.readouterr().err


def test_publish_refuses_a_bad_export_with_a_message(root, tmp_path, capsys):
    assert main(["publish", str(tmp_path), "--store", str(root)]) == 2
    assert "draft.json is missing" in capsys.readouterr().err
    assert open_store(root).versions("toy") == [1, 2]
