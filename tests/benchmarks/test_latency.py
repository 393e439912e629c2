"""Percentiles and ratios, compared with what counting by hand gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoe.bench.latency import BLOCK, Latency, measure
from specmoe.bench.rest import ratio

TIMES = st.lists(st.floats(1, 1e6), min_size=1, max_size=300)


def latency(*times_us: float, seconds: float = 1.0) -> Latency:
    made = Latency()
    made.add(times_us, seconds)
    return made


@given(times=TIMES, share=st.floats(0, 100))
def test_a_percentile_is_a_measured_time_that_at_most_its_share_lie_below(
    times: list[float], share: float
) -> None:
    percentile = latency(*times).percentile_us(share)
    below = sum(time < percentile for time in times)
    assert percentile in times
    # Of n times, share * (n - 1) lie below, counted up to a whole one.
    assert below <= share / 100 * (len(times) - 1) + 1


def test_percentiles_of_a_hundred_and_one_times_are_the_times_themselves() -> None:
    report = latency(*range(101), seconds=2.0).report()
    assert report == {"p50_us": 50, "p99_us": 99, "calls": 101, "per_second": 50.5}


def test_nothing_measured_is_nothing_reported() -> None:
    assert Latency().report() == {}


def test_rounds_add_up() -> None:
    made = latency(1.0, 2.0, seconds=0.5)
    made.add([3.0], 0.5)
    assert made.report() == {"p50_us": 2.0, "p99_us": 3.0, "calls": 3, "per_second": 3.0}


def test_contenders_take_turns_on_the_same_inputs() -> None:
    calls: list[tuple[str, int]] = []
    first, second = Latency(), Latency()
    contenders = [
        (lambda number: calls.append(("first", number)), first),
        (lambda number: calls.append(("second", number)), second),
    ]
    measure(contenders, 0.01)
    assert calls[: 2 * BLOCK] == [(name, number) for name in ("first", "second") for number in range(BLOCK)]
    assert len(first) == len(second) == len(calls) / 2


@pytest.mark.parametrize(
    ("service_us", "connections", "expected"),
    [(300.0, 1, 1.0), (480.0, 1, 1.6), (2000.0, 16, 2000 / 1800)],
    ids=["nothing added", "the aim", "each waits for all models"],
)
def test_the_ratio_counts_a_model_call_for_every_connection(
    service_us: float, connections: int, expected: float
) -> None:
    assert ratio(latency(service_us), latency(200.0), latency(100.0), connections) == pytest.approx(expected)
