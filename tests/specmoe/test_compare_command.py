"""`specmoe compare --quick` from end to end on a toy: report, pictures, resuming, refusals."""

import json
import shutil
from pathlib import Path

import pytest

from specmoe.cli import main
from tests.training.toy_hidden import save_shards, with_hidden
from tests.training.toy_routing import toy_trace
from tests.training.toy_run import TRAIN, VALIDATION, save_npz
from training import compare as comparing
from training.compare import RESULTS, Comparison

NAMES = ["popularity", "oracle", "prefix", "control-shuffled"]


def command(folder: Path, *words: str) -> list[str]:
    files = [str(folder / f"{use}.npz") for use in ("train", "validation", "test")]
    given = ["compare", "--traces", files[0], "--validation", files[1], "--test", files[2], "--quick"]
    return [*given, "--folder", str(folder / "out"), "--every", "3", *words]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three splits and a finished comparison of `NAMES`, the best with two seeds."""
    folder = tmp_path_factory.mktemp("compared")
    for use, trace in (("train", TRAIN), ("validation", VALIDATION), ("test", toy_trace((20, 9), seed=7))):
        save_npz(trace, folder / f"{use}.npz")
    assert main(command(folder, "--predictors", *NAMES, "--top-seeds", "2")) == 0
    return folder


def test_everything_asked_for_is_in_the_report(compared: Path) -> None:
    document = json.loads((compared / "out" / "compare.json").read_text())
    assert {result["name"] for result in document["results"]} == set(NAMES)
    assert [(result["name"], result["seed"]) for result in document["further"]] == [("prefix", 1)]
    report = (compared / "out" / "report.md").read_text()
    assert all(f"| {name} " in report for name in NAMES)
    assert "numbers say that everything runs, and nothing else" in report and "33.75" in report


def test_pictures_of_the_report_exist(compared: Path) -> None:
    report = (compared / "out" / "report.md").read_text()
    pictures = {path.name for path in (compared / "out").glob("*.png")}
    assert len(pictures) == 5 and all(f"({picture})" in report for picture in pictures)


def test_the_oracle_is_right_and_steps_are_timed(compared: Path) -> None:
    results = {r["name"]: r for r in json.loads((compared / "out" / "compare.json").read_text())["results"]}
    assert results["oracle"]["distances"]["1"]["recall_at_k"] == 1
    assert results["prefix"]["cost"]["step_us"] > 0


def test_those_that_read_hidden_states_are_compared_where_there_are_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {"train": TRAIN, "validation": VALIDATION, "test": toy_trace((20, 9), seed=7)}
    for use, trace in splits.items():
        save_shards(with_hidden(trace), tmp_path / f"{use}.npz")  # a folder, whatever its name
    words = command(tmp_path, "--predictors", "next-gate", "oracle")
    assert main(words) == 0
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    scores = {result["name"]: result["distances"]["1"]["recall_at_k"] for result in document["results"]}
    assert scores["oracle"] == 1 > scores["next-gate"] > 0.6
    shutil.rmtree(tmp_path / "train.npz")
    save_shards(TRAIN, tmp_path / "train.npz")
    capsys.readouterr()
    again = [word.replace("out", "other") for word in words]
    assert main(again) == 2 and "have no hidden states" in capsys.readouterr().err


def test_what_is_finished_is_not_done_again(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("trained or exported again")

    monkeypatch.setattr(comparing, "train", refused)
    monkeypatch.setattr(comparing, "export", refused)
    (compared / "out" / RESULTS / "prefix.json").unlink()  # interrupted while it was scored
    assert main(command(compared, "--predictors", "prefix", "random")) == 0


def test_interrupted_and_started_again_it_loses_one_approach(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    score = Comparison._plain

    def interrupted(*given: object) -> dict[str, object]:
        asked.append(given[1].name)  # type: ignore[attr-defined]
        if len(asked) == 2:
            raise KeyboardInterrupt
        return score(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Comparison, "_plain", interrupted)
    words = command(compared, "--predictors", "repeat", "layer-markov")
    assert (main(words), main(words)) == (130, 0)
    assert asked == ["repeat", "layer-markov", "layer-markov"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--predictors", "prefx"], "'prefx' is no approach"),
        (["--passes", "2"], "holds a comparison with passes None, now 2. Give the options"),
    ],
    ids=["unknown approach", "another comparison"],
)
def test_refusals_tell_what_to_do(
    compared: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(command(compared, *words)) == 2
    assert told in capsys.readouterr().err
