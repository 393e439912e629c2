"""docs/reference-moe.md names every option of the commands, and every source of text."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from specmoe.commands.reference_moe import add_arguments
from specmoe.commands.train import knobs
from training.reference_moe.config import DEFAULTS
from training.reference_moe.packages import SOURCES

PAGE = (Path(__file__).parents[3] / "docs" / "reference-moe.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    table = PAGE.partition(header)[2].partition("\n\n")[0]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_options_of_train_are_listed_with_their_defaults() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    (actions,) = parser._actions
    assert actions.choices is not None
    train = actions.choices["train"]  # type: ignore[index]
    options = {action.option_strings[0] for action in train._actions if action.dest != "help"}
    listed = {cells[0].split()[0]: cells[1] for cells in rows("| option of `train` | |")}
    assert listed.keys() == options
    for knob in knobs(DEFAULTS["decoder"]):
        told = re.findall(r"default `?([\w.]+)", listed[knob.flag].replace(",", ""))
        assert told[0] == str(knob.default), knob.flag


def test_every_source_of_text_is_listed_with_its_licence() -> None:
    listed = [tuple(cells[:3]) for cells in rows("| domain | package | licence |")]
    packages = [(domain, package.split()[0], licence) for domain, package, licence in listed]
    assert packages == [(source.domain, source.package, source.licence) for source in SOURCES]
