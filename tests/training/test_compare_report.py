"""The report of a comparison: order, checks, frontier."""

from typing import Any

import pytest

from training.compare_plots import frontier, served_us
from training.compare_report import checks, ranked, seed_table


def result(name: str, recall: float, kind: str = "trained", seed: int = 0) -> dict[str, Any]:
    distances = {d: {"recall_at_k": recall, "recall_at_2k": recall} for d in ("start", "1")}
    return {"name": name, "kind": kind, "seed": seed, "distances": distances}


def document(*results: dict[str, Any], further: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"results": list(results), "further": list(further), "quick": False}


@pytest.mark.parametrize(
    ("costs", "scores", "expected"),
    [
        ([1, 2, 3], [0.1, 0.2, 0.3], [0, 1, 2]),
        ([3, 2, 1], [0.1, 0.2, 0.3], [2]),
        ([1, 1, 2], [0.1, 0.2, 0.2], [1]),
        ([], [], []),
    ],
    ids=["all of them", "the cheapest is best", "ties", "none"],
)
def test_the_frontier_holds_whom_none_beats(
    costs: list[float], scores: list[float], expected: list[int]
) -> None:
    assert frontier(costs, scores) == expected


@pytest.mark.parametrize(("step", "expected"), [(40.0, 40.0), (None, 90.0)], ids=["step", "predict"])
def test_a_served_call_is_a_step_where_there_is_one(step: float | None, expected: float) -> None:
    assert served_us({"cost": {"predict_us": 90.0, "step_us": step}}) == expected


def test_the_best_comes_first() -> None:
    found = ranked(document(result("a", 0.2), result("b", 0.5), result("c", 0.3)))
    assert [r["name"] for r in found] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("recall", "told"), [(0.31, "as it must be"), (0.4, "something leaks")], ids=["falls", "does not"]
)
def test_the_control_must_fall_to_popularity(recall: float, told: str) -> None:
    lines = checks(
        document(result("popularity", 0.3, "baseline"), result("control-shuffled", recall, "control"))
    )
    assert len(lines) == 1 and told in lines[0]


def test_an_oracle_that_is_not_perfect_is_told() -> None:
    assert "the scoring is wrong" in checks(document(result("oracle", 0.99, "baseline")))[0]


def test_seeds_are_told_as_mean_and_deviation() -> None:
    table = seed_table(document(result("a", 0.2), result("b", 0.1), further=(result("a", 0.4, seed=1),)))
    assert "0.3000 ± 0.1414" in table and "| b" not in table
