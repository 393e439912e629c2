"""What the report shows is what was measured, whatever the trace and the version lacked."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from model_store.manifest import Coverage
from speculation.runtime import Speculator
from tests.toy_version import toy_stored
from tests.training.toy_routing import SPEC, toy_trace
from traces.spec import RoutingSpec
from training.baselines import BASELINES
from training.evaluate import evaluate
from training.report import (
    METRICS,
    REPORT,
    UNKNOWN,
    adaptation_table,
    baseline_table,
    cache_table,
    distance_table,
    few_distances,
    markdown,
    write_json,
    write_report,
)

PICTURES = {"recall_by_distance.png", "recall_by_layer.png", "reliability.png", "coverage.png"}


def toy_document(
    *,
    spec: RoutingSpec = SPEC,
    gates: bool = True,
    baselines: bool = True,
    caches: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    speculator = Speculator(toy_stored(spec, **overrides), provider="cpu")
    trace = toy_trace(spec=spec, gates=gates)
    fitted = [kind().fit(trace) for kind in BASELINES.values()] if baselines else []
    return evaluate(speculator, trace, baselines=fitted, cache=caches, adapt=caches).document()


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return toy_document(caches=True)


@pytest.fixture(scope="module")
def folder(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "new" / "report"
    write_report(document, path)
    return path


def test_a_report_is_text_numbers_and_pictures(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {REPORT, METRICS} | PICTURES


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_every_picture_shows_something(folder: Path, name: str) -> None:
    pixels = matplotlib.image.imread(folder / name)
    assert pixels.shape[1] > 1000 and pixels[..., :3].std() > 0.05


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_every_picture_is_in_the_text(folder: Path, name: str) -> None:
    assert f"({name})" in (folder / REPORT).read_text()


def test_a_second_report_replaces_the_first(document: dict[str, Any], folder: Path) -> None:
    write_report(document | {"version": 77}, folder)
    assert (folder / REPORT).read_text().startswith("# toy, version 77\n")


def test_the_numbers_are_the_documents_to_six_digits(document: dict[str, Any], tmp_path: Path) -> None:
    write_json(document, tmp_path / "scores.json")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["distances"]["1"]["ece"] == pytest.approx(document["distances"]["1"]["ece"], abs=1e-6)
    assert written["tokens"] == document["tokens"]


def test_the_table_shows_the_scores_of_each_distance(document: dict[str, Any]) -> None:
    start = document["distances"]["start"]
    row = distance_table(document, ["start"]).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["start", f"{start['recall_at_k']:.3f}", f"{start['recall_at_2k']:.3f}"]


def test_tables_are_aligned_for_the_terminal(document: dict[str, Any]) -> None:
    assert len({len(line) for line in distance_table(document, few_distances(document)).splitlines()}) == 1


def test_the_version_stands_beside_every_baseline(document: dict[str, Any]) -> None:
    table = baseline_table(document)
    assert [name for name in [*BASELINES, "toy 1"] if name not in table] == []


def test_few_distances_are_the_start_and_powers_of_two() -> None:
    distances = {"start": {}} | {str(d): {} for d in range(1, 12)}
    assert few_distances({"distances": distances}) == ["start", "1", "2", "4", "8"]


@pytest.mark.parametrize(
    "title",
    [
        "Without token ids",
        "Without gates",
        "By domain",
        "Coverage",
        "Coverage with adaptation",
        "What a cache keeps",
    ],
)
def test_the_text_has_a_section(document: dict[str, Any], title: str) -> None:
    assert f"## {title}\n" in markdown(document, {})


def test_what_is_unknown_without_gates_is_left_open(tmp_path: Path) -> None:
    document = toy_document(gates=False, baselines=False)
    write_report(document, tmp_path)
    text = (tmp_path / REPORT).read_text()
    assert UNKNOWN in distance_table(document, ["start"])
    assert "top-1 accuracy" not in text and "baselines" not in text


def test_a_version_without_coverage_tables_has_no_coverage_picture(tmp_path: Path) -> None:
    write_report(toy_document(baselines=False, coverage=Coverage(levels=(), experts=())), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == PICTURES - {"coverage.png"}


def test_what_a_cache_keeps_and_adaptation_are_told_where_asked_for(document: dict[str, Any]) -> None:
    assert "clairvoyant" in cache_table(document)
    assert "maths, adapted" in adaptation_table(document)
    text = markdown(toy_document(baselines=False), {})
    assert "What a cache keeps" not in text and "adaptation" not in text


def test_a_model_of_one_layer_can_be_reported(tmp_path: Path) -> None:
    document = toy_document(spec=RoutingSpec("one", 1, 8, 2))
    write_report(document, tmp_path)
    assert list(document["distances"]) == ["start"]
