"""docs/collecting.md names every option of `specmoe collect` and every family that is verified."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from specmoe.commands.collect import add_arguments
from tests.training.toy_models import FAMILIES, OTHERS
from training.collection.readers import READERS
from training.collection.recording import SHARD_TOKENS

PAGE = (Path(__file__).parents[2] / "docs" / "collecting.md").read_text(encoding="utf-8")


def first_cells(header: str) -> list[str]:
    table = PAGE.partition(header)[2].partition("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def test_every_option_is_listed_with_its_default() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    listed = {
        cell.strip("`").split()[0]: line
        for cell, line in zip(first_cells("| option | |"), rows(), strict=True)
    }
    actions = {next(iter(action.option_strings), "MODEL"): action for action in parser._actions}
    assert listed.keys() == actions.keys()
    for name, action in actions.items():
        if action.default not in (None, False):
            assert re.search(rf"default `?{action.default}", listed[name])


def rows() -> list[str]:
    return PAGE.partition("| option | |")[2].partition("\n\n")[0].splitlines()[2:]


def test_every_family_that_is_verified_is_listed() -> None:
    cells = ", ".join(first_cells("| family | routing |"))
    assert set(re.findall(r"`([^`]+)`", cells)) == FAMILIES.keys() | OTHERS.keys()


def test_the_page_counts_what_the_code_has() -> None:
    assert len(READERS) == 5
    assert "Five classes differ" in PAGE
    assert f"({SHARD_TOKENS:,}\ntokens at most)" in PAGE
