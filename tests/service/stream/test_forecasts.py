"""From probabilities to lists: how long, how far ahead, and whose experts a union has.

.venv/bin/python -m pytest tests/service/stream/test_forecasts.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.loading import Running
from service.metrics import Metrics
from service.stream.forecasts import Forecasts
from service.stream.hub import Due
from service.stream.messages import Hello, Kind, Ranking
from tests.service.stream.conversing import SPECULATOR
from tests.toy_version import TOY_SPEC

RUNNING = Running("toy", 2, SPECULATOR, "", 0.0, Metrics().of_version("toy", 2))
TOKENS = [0, 0]


def rankings(probabilities: Any, seen: int = 0, **hello: Any) -> dict[Kind, Ranking]:
    """Of two sequences. probabilities: [2, E], the same for each layer."""
    by_layer = np.array(probabilities, np.float32)[:, None].repeat(TOY_SPEC.num_layers, 1)
    due = Due(None, 5, seen, [0, 1], 0.0)  # type: ignore[arg-type]
    forecasts = Forecasts(Hello(tag=1, model="toy", **hello), RUNNING)
    return dict(forecasts.rankings(due, [7, 8], TOKENS, 3, by_layer))


FIRST = [0.9, 0.8, 0.65, 0.1, 0.45, 0.0, 0.0, 0.0]
SECOND = [0.8, 0.9, 0.1, 0.65, 0.45, 0.0, 0.0, 0.0]
UNSURE = [0.9, 0.8, 0.65, 0.1, 0.6, 0.0, 0.0, 0.0]


def test_a_union_by_coverage_has_the_experts_of_some_sets_and_no_others() -> None:
    # At coverage 0.9 the next layer's set has three experts: 4, in neither, has more demand than 2 and 3.
    told = rankings([FIRST, SECOND], seen=2, coverage=0.9, union=True)
    forecast, union = told[Kind.FORECAST], told[Kind.UNION]
    assert [set(row) for row in forecast.experts[:, 0, : forecast.sizes[0, 0]].tolist()] == [
        {0, 1, 2},
        {0, 1, 3},
    ]
    listed = union.experts[0, : union.sizes[0]].tolist()
    assert listed == [0, 1, 2, 3]
    demand = [1 - (1 - FIRST[expert]) * (1 - SECOND[expert]) for expert in listed]
    assert union.probabilities[0, :4] == pytest.approx(demand)


def test_each_sequence_has_a_set_of_its_own_size() -> None:
    # The first-ranked three, and whoever has a chance of 0.5.
    forecast = rankings([FIRST, UNSURE], seen=2, coverage=0.9)[Kind.FORECAST]
    assert forecast.sizes.tolist() == [[3, 4], [4, 4]]
    assert forecast.experts.shape == (2, 2, 4)
    assert forecast.experts[1, 0].tolist() == [0, 1, 2, 4]


def test_a_union_by_number_has_those_with_most_demand() -> None:
    union = rankings([FIRST, SECOND], top_n=3, union=True, per_sequence=False)
    assert list(union) == [Kind.UNION]
    assert union[Kind.UNION].experts[0].tolist() == [0, 1, 4]


def test_twice_as_many_as_are_routed_come_where_hello_asks_for_no_number() -> None:
    assert rankings([FIRST, SECOND])[Kind.FORECAST].sizes.tolist() == [[4, 4, 4, 4]] * 2


def test_heads_say_what_it_is_of() -> None:
    ranking = rankings([FIRST, SECOND], seen=3, top_n=1)[Kind.FORECAST]
    assert (ranking.tag, ranking.first_layer, ranking.dropped, ranking.sequences) == (5, 3, 3, [7, 8])
    assert ranking.experts.tolist() == [[[0]], [[1]]]
