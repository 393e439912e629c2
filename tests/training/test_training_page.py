"""docs/training-guide.md names every knob with its defaults, docs/model-architecture.md every predictor."""

import re
from pathlib import Path

import numpy as np
import pytest

from specmoe.commands.train import Knob, knobs
from traces.spec import RoutingSpec
from training.outlook import OutlookConfig
from training.predictors import kind_of
from training.presets import PRESETS
from training.vocabulary import Vocabulary

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "training-guide.md").read_text(encoding="utf-8")
PREDICTORS = (DOCS / "model-architecture.md").read_text(encoding="utf-8")


def rows(after: str) -> dict[str, list[str]]:
    """The cells of the table behind these words, by knob; the knob itself is left out."""
    table = PAGE.partition(after)[2].lstrip("\n").partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in cells}


def default(knob: Knob) -> str:
    value = knob.default
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(v if isinstance(v, str) else f"{v:g}" for v in values)


def unit(knob: Knob) -> str:
    return re.findall(r"\(([^()]*)\)", knob.meaning)[-1].partition(";")[0]


def test_knobs_of_training_are_listed_with_their_defaults() -> None:
    table = rows("### How it is trained\n")
    expected = {knob.flag: knob for knob in knobs(PRESETS["prefix"].train)}
    assert list(table) == list(expected)
    for flag, (came, shown, _) in table.items():
        assert came == unit(expected[flag])
        assert shown.partition(";")[0] == default(expected[flag])


@pytest.mark.parametrize("name", PRESETS)
def test_where_a_predictor_is_trained_otherwise_it_is_said(name: str) -> None:
    table, usual = rows("### How it is trained\n"), dict(vars(PRESETS["prefix"].train))
    for knob in knobs(PRESETS[name].train):
        if knob.default != usual[knob.name]:
            shown = table[knob.flag][1].partition("; ")[2]
            assert default(knob) in shown


@pytest.mark.parametrize(
    "name", ["prefix", "interlayer", "interlayer-extended", "interlayer-enhanced", "multiscale"]
)
def test_knobs_of_size_are_listed_with_their_defaults(name: str) -> None:
    table = rows("`prefix`:\n" if name == "prefix" else "and `multiscale`:\n")
    column = 1 if name in ("prefix", "interlayer") else 1 + list(PRESETS).index(name) - 1
    listed = {flag: (cells[0], cells[column]) for flag, cells in table.items() if cells[column]}
    assert listed == {knob.flag: (unit(knob), default(knob)) for knob in knobs(PRESETS[name].config)}


@pytest.mark.parametrize("column", range(1, 5))
def test_knobs_of_those_that_read_hidden_states_are_listed_with_their_defaults(column: int) -> None:
    name = ["next-gate", "hidden-linear", "hidden-mlp", "prefix-hidden"][column - 1]
    table = rows("behind its name, too (`--prefix-width`):\n")
    listed = {flag: (cells[0], cells[column]) for flag, cells in table.items() if cells[column]}
    own = [knob for knob in knobs(PRESETS[name].config) if not knob.name.startswith("prefix_")]
    assert listed == {knob.flag: (unit(knob), default(knob)) for knob in own}


def test_knobs_of_an_outlook_are_listed_with_their_defaults() -> None:
    listed = {flag: (cells[0], cells[1]) for flag, cells in rows("[--store LOCATION] [KNOBS]\n").items()}
    assert listed == {knob.flag: (unit(knob), default(knob)) for knob in knobs(OutlookConfig())}


@pytest.mark.parametrize("name", ["interlayer", "interlayer-extended", "interlayer-enhanced"])
def test_the_page_counts_parameters_as_they_are(name: str) -> None:
    spec = RoutingSpec("gpt-oss-20b", 24, 32, 4)
    network = kind_of(PRESETS[name].config).network(
        spec, PRESETS[name].config, Vocabulary.of(None, np.array([0]))
    )
    assert f"{sum(parameter.numel() for parameter in network.parameters()):,}" in PREDICTORS


def test_every_predictor_has_its_place() -> None:
    assert all(f"| `{name}` |" in PREDICTORS for name in PRESETS)
