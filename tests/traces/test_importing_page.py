"""docs/importing.md: it names every format, what it must be told, and the limits of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from traces.importers import json_records
from traces.importers.formats import FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "importing.md").read_text(encoding="utf-8")
ROWS = {
    name: cells
    for name, *cells in re.findall(r"^\| `([a-z][a-z-]+)` \|(.*)\|(.*)\|(.*)\|$", PAGE, re.MULTILINE)
}


def test_the_table_has_every_format_with_its_files_and_options() -> None:
    told = {
        name: (
            tuple(re.findall(r"`(\.[a-z]+)`", files)),
            {option.replace("-", "_") for option in re.findall(r"`--([a-z-]+)`", options)} - {"model"},
        )
        for name, (_, files, options) in ROWS.items()
    }
    assert told == {name: (form.suffixes, set(form.uses)) for name, form in FORMATS.items()}


@pytest.mark.parametrize(
    "claim",
    [f"more than {json_records.MAX_BYTES >> 30} GiB", f"at most {json_records.MAX_JSON_BYTES >> 20} MiB"],
)
def test_the_page_says_what_the_code_does(claim: str) -> None:
    assert claim in PAGE
