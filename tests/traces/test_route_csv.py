"""The route-trace CSV: its rows become tokens and sequences, and every malformed line is named."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import COLUMN_NAMES, preamble, route_csv_rows, write_route_csv
from traces.errors import TraceError, TraceFormatError
from traces.importers import csv_columns, route_csv
from traces.importers.model import model_name
from traces.importers.route_rows import NO_LAST_LAYER

Rows = list[list[str]]
FIRST_LINE = len(preamble()) + 1


def naive(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_experts_and_weights_are_those_of_the_rows(tmp_path: Path) -> None:
    path = write_route_csv(tmp_path / "x.csv")
    trace = route_csv.read(path).trace
    assert trace.gates is not None
    of = {(row["step"], row["layer"], row["slot"]): row for row in naive(path)}
    steps = [2, 3, 4, 7, 8, 9]  # two turns; the first two tokens of each prompt lack the last layer
    for token, step in enumerate(steps):
        for layer in range(3):
            for slot in range(2):
                row = of[str(step), str(layer + 1), str(slot)]
                assert trace.experts[token, layer, slot] == int(row["expert"])
                assert trace.gates[token, layer, slot] == np.float32(row["weight"])


def test_turns_are_sequences_and_the_spec_counts_layers_with_experts(tmp_path: Path) -> None:
    trace = route_csv.read(write_route_csv(tmp_path / "x.csv")).trace
    assert trace.starts.tolist() == [0, 3, 6]
    assert (trace.spec.model, trace.spec.num_layers, trace.spec.num_experts) == ("Toy-1B-Q4", 3, 8)
    assert trace.domains == ("unknown", "unknown")


def test_prompt_tokens_without_the_last_layer_are_counted(tmp_path: Path) -> None:
    assert route_csv.read(write_route_csv(tmp_path / "x.csv")).notes == {NO_LAST_LAYER: 4}


def test_a_prompt_with_all_layers_is_kept_whole(tmp_path: Path) -> None:
    rows = [["0", "0", *row[2:]] for row in route_csv_rows(turns=1, prompt=1, generated=5)]
    imported = route_csv.read(write_route_csv(tmp_path / "x.csv", rows))
    assert (imported.trace.num_tokens, imported.notes[NO_LAST_LAYER]) == (6, 0)


def test_a_token_that_was_left_out_ends_a_sequence(tmp_path: Path) -> None:
    rows = route_csv_rows(turns=1, prompt=2, generated=0) + second_part()
    rows = [row for row in rows if row[:4] != ["0", "0", "2", "3"]]
    trace = route_csv.read(write_route_csv(tmp_path / "x.csv", rows)).trace
    assert trace.starts.tolist() == [0, 1, 2]


def second_part() -> Rows:
    """Another batch of the same prompt: steps 2 and 3, of which the recorder ran all layers."""
    rows = [["0", "0", "2", *row[3:]] for row in route_csv_rows(turns=1, prompt=1, generated=0)]
    return rows + [["0", "0", "3", *row[3:]] for row in rows]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(tmp_path: Path, seed: int) -> None:
    rows = route_csv_rows()
    shuffled = random.Random(seed).sample(rows, len(rows))
    one = route_csv.read(write_route_csv(tmp_path / "one.csv", rows)).trace
    other = route_csv.read(write_route_csv(tmp_path / "other.csv", shuffled)).trace
    assert np.array_equal(one.experts, other.experts)
    assert one.starts.tolist() == other.starts.tolist()


def test_columns_are_found_by_name_and_new_ones_ignored(tmp_path: Path) -> None:
    names = ["dropped", *reversed(COLUMN_NAMES.split(","))]
    rows = [["0", *reversed(row)] for row in route_csv_rows()]
    turned = route_csv.read(write_route_csv(tmp_path / "x.csv", rows, [*preamble()[:-1], ",".join(names)]))
    plain = route_csv.read(write_route_csv(tmp_path / "y.csv"))
    assert np.array_equal(turned.trace.experts, plain.trace.experts)


def test_weights_unknown_throughout_are_no_gates(tmp_path: Path) -> None:
    rows = [[*row[:6], "nan", *row[7:]] for row in route_csv_rows()]
    assert route_csv.read(write_route_csv(tmp_path / "x.csv", rows)).trace.gates is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/Qwen3-30B-A3B-Q4_K_M.gguf", "Qwen3-30B-A3B-Q4_K_M"),
        (r"C:\models\toy.gguf", "toy"),
        ("big-00001-of-00003.gguf", "big"),
        ("toy", "toy"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
    ],
)
def test_a_model_is_named_after_its_file(path: str, name: str) -> None:
    assert model_name(path) == name


def test_a_path_with_spaces_names_no_model_unless_one_is_given(tmp_path: Path) -> None:
    path = write_route_csv(tmp_path / "x.csv", head=preamble(model="/my models/my toy.gguf"))
    with pytest.raises(TraceFormatError, match=r"name 'my toy' is not usable.*--model NAME"):
        route_csv.read(path)
    assert route_csv.read(path, model="toy").trace.spec.model == "toy"


def cell(row: int, column: str, value: str) -> Callable[[Rows], Rows]:
    at = COLUMN_NAMES.split(",").index(column)

    def change(rows: Rows) -> Rows:
        return [
            [value if (r, c) == (row, at) else text for c, text in enumerate(columns)]
            for r, columns in enumerate(rows)
        ]

    return change


def without(part: slice) -> Callable[[Rows], Rows]:
    def change(rows: Rows) -> Rows:
        gone = range(*part.indices(len(rows)))
        return [row for index, row in enumerate(rows) if index not in gone]

    return change


# Of the first turn: rows 0-5 layer 1 of the prompt, 6-11 layer 2, 12-13 layer 3, then 6 for each token.
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            cell(3, "expert", "8"), f"line {FIRST_LINE + 3}: found 'expert 8', expected 0 to 7", id="expert"
        ),
        pytest.param(
            cell(3, "expert", "-1"), f"line {FIRST_LINE + 3}: found 'expert -1'", id="expert negative"
        ),
        pytest.param(
            cell(4, "layer", "4"), f"line {FIRST_LINE + 4}: found 'layer 4', expected 0 to 3", id="layer"
        ),
        pytest.param(cell(4, "slot", "2"), "found 'slot 2', expected 0 to 1", id="slot"),
        pytest.param(cell(4, "phase", "2"), "found 'phase 2', expected 0 to 1", id="phase"),
        pytest.param(cell(4, "step", "-1"), "found 'step -1', expected 0 or more", id="step"),
        pytest.param(cell(4, "turn", "-1"), "found 'turn -1', expected 0 or more", id="turn"),
        pytest.param(
            cell(4, "expert", "x"), f"line {FIRST_LINE + 4}: .*invalid value 'x'", id="not a number"
        ),
        pytest.param(cell(4, "expert", "1.5"), "invalid value '1.5'", id="not an integer"),
        pytest.param(cell(4, "expert", ""), "invalid value ''", id="empty"),
        pytest.param(cell(4, "step", "9999999999"), "invalid value '9999999999'", id="huge"),
        pytest.param(
            cell(4, "weight", "1,2"), f"line {FIRST_LINE + 4}: Expected 9 columns, got 10", id="comma"
        ),
        pytest.param(
            cell(13, "weight", "nan"), rf"line {FIRST_LINE + 13} \(turn 0, step 2\): weight nan", id="nan"
        ),
        pytest.param(cell(14, "weight", "-0.1"), "weight -0.1.*, expected a finite number", id="negative"),
        pytest.param(cell(14, "weight", "inf"), "weight inf, expected a finite number", id="infinite"),
        pytest.param(
            cell(15, "slot", "0"),
            rf"line {FIRST_LINE + 15} \(turn 0, step 3\): layer 1, slot 0 again, after",
            id="slot twice",
        ),
        pytest.param(
            without(slice(15, 16)),
            r"the step has 5 rows, the last of them here, expected 3 layers x 2",
            id="slot gone",
        ),
        pytest.param(without(slice(14, 16)), "the step has 4 rows", id="layer gone"),
        pytest.param(without(slice(14, 20)), "comes after step 2, expected step 3 between", id="step gone"),
        pytest.param(without(slice(0, 1)), "the step has 3 rows", id="prompt slot gone"),
        pytest.param(without(slice(-1, None)), "the step has 5 rows", id="cut short"),
        pytest.param(without(slice(-2, None)), "the step has 4 rows", id="cut short before the last layer"),
        pytest.param(without(slice(12, None)), "no rows of layer 3, .* preamble", id="cut in the prompt"),
        pytest.param(without(slice(0, None)), "column names but no rows", id="no rows"),
        pytest.param(
            lambda rows: [*rows[:20], [""], *rows[20:]], f"line {FIRST_LINE + 20}: .*invalid", id="blank line"
        ),
    ],
)
def test_malformed_rows_are_refused_with_file_and_line(
    tmp_path: Path, change: Callable[[Rows], Rows], reason: str
) -> None:
    path = write_route_csv(tmp_path / "x.csv", change(route_csv_rows()))
    with pytest.raises(TraceError, match=reason) as refusal:
        route_csv.read(path)
    assert refusal.value.message.startswith(str(path))


def test_an_expert_routed_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = route_csv_rows()
    rows[15][5] = rows[14][5]
    reason = rf"line {FIRST_LINE + 15} \(turn 0, step 3\): layer 1 routes to expert {rows[14][5]} twice"
    with pytest.raises(TraceError, match=reason):
        route_csv.read(write_route_csv(tmp_path / "x.csv", rows))


def test_a_trace_of_prompt_tokens_without_the_last_layer_alone_is_refused(tmp_path: Path) -> None:
    rows = [row for row in route_csv_rows(turns=1, prompt=3, generated=0) if row[2] != "2"]
    rows += [["1", "0", "0", "3", *row[4:]] for row in rows[:2]]
    with pytest.raises(TraceError, match="turn 1, step 0"):
        route_csv.read(write_route_csv(tmp_path / "x.csv", rows))


HEAD = preamble()


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        pytest.param([], "line 1: found '0,0,0,1,0,.*, expected # route_trace v1", id="none"),
        pytest.param(["# route_trace v2", *HEAD[1:]], "line 1: found '# route_trace v2'", id="version"),
        pytest.param([HEAD[0], *HEAD[2:]], "line 2: found '# layer=0.*expected # model=", id="no model"),
        pytest.param(HEAD[:1], "line 2: found '0,0,0", id="version only"),
        pytest.param(HEAD[:-1], "found '0,0,0,1,0,.*expected a column turn, once", id="no names"),
        pytest.param(
            [*HEAD[:-1], COLUMN_NAMES.replace("slot", "place")], "a column slot, once", id="renamed"
        ),
        pytest.param([*HEAD[:-1], COLUMN_NAMES.replace("slot", "turn")], "a column turn, once", id="twice"),
        pytest.param([HEAD[0], "# x" * 40000], "line 2: found '# x# x", id="endless line"),
        pytest.param([HEAD[0], *["#"] * 3000], "line 2: found '#'", id="endless preamble"),
        pytest.param(
            [HEAD[0], HEAD[1].replace("n_expert=8", "n_expert=0"), *HEAD[2:]],
            "num_experts is 0",
            id="no experts",
        ),
        pytest.param(
            [HEAD[0], HEAD[1].replace("used=2", "used=9"), *HEAD[2:]],
            "top_k is 9, expected 1 to 8",
            id="top-k",
        ),
    ],
)
def test_a_malformed_preamble_is_refused_with_file_and_line(
    tmp_path: Path, head: list[str], reason: str
) -> None:
    path = write_route_csv(tmp_path / "x.csv", head=head)
    with pytest.raises(TraceFormatError, match=reason) as refusal:
        route_csv.read(path)
    assert refusal.value.message.startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\x89PNG\r\n"], ids=["empty", "bytes", "picture"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(TraceFormatError, match=r"x\.csv"):
        route_csv.read(tmp_path / "x.csv")


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_columns, "MAX_BYTES", 100)
    with pytest.raises(TraceFormatError, match="100 at most are read"):
        route_csv.read(write_route_csv(tmp_path / "x.csv"))
