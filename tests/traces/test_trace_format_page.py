"""docs/trace-format.md: its examples run, and its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.traces.made_up import TOY, made_up_trace, write_route_csv
from traces.files import load
from traces.importers import csv_columns, npz, route_csv
from traces.parquet import MAX_SHARD_TOKENS
from traces.shard import MAX_ROWS_PER_GROUP, schema

PAGE = (Path(__file__).parents[2] / "docs" / "trace-format.md").read_text(encoding="utf-8")


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_npz_example_makes_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(examples()[0], {})
    assert load(tmp_path / "recording.npz").num_sequences == 2


def test_the_parquet_example_counts_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorded = [made_up_trace(token_ids=False, seed=seed) for seed in range(3)]
    names = {"spec": TOY, "recorded": recorded}
    exec(examples()[1], names)
    assert names["tokens"] == 24


def test_the_csv_example_is_read(tmp_path: Path) -> None:
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]
    start = lines.index("# route_trace v1")
    head, row = lines[start : start + 4], lines[start + 4].split(",")
    head[1] = head[1].replace("n_expert_used=6", "n_expert_used=1")
    assert route_csv.read(write_route_csv(tmp_path / "x.csv", [row], head)).trace.experts.tolist() == [[[49]]]


@pytest.mark.parametrize(
    "claim",
    [
        f"at most {MAX_SHARD_TOKENS:,} tokens",
        f"at most {MAX_ROWS_PER_GROUP} rows",
        f"array of more than {npz.MAX_ARRAY_BYTES >> 30} GiB",
        f"file of more than {csv_columns.MAX_BYTES >> 30} GiB",
        *(f"| `{name}` |" for name in (*npz.REQUIRED, *npz.OPTIONAL)),
        *(
            f"| `{name}` |"
            for name in schema(TOY, gates=True, token_ids=True, prefill=True, hidden_size=4).names
        ),
        *(f"`{name}`" for name in route_csv.COLUMNS),
    ],
)
def test_the_page_says_what_the_code_does(claim: str) -> None:
    assert claim in PAGE
