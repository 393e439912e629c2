"""What a batch needs together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from speculation.demand import union_demand

PROBABILITIES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=3, max_dims=3, max_side=6),
    elements=st.floats(0, 1, width=32),
)


@settings(deadline=None)
@given(PROBABILITIES)
def test_union_demand_is_a_naive_product(probabilities):
    batch, layers, experts = probabilities.shape
    demand = union_demand(probabilities)
    for layer in range(layers):
        for expert in range(experts):
            nobody = 1.0
            for sequence in range(batch):
                nobody *= 1.0 - float(probabilities[sequence, layer, expert])
            assert abs(demand[layer, expert] - (1.0 - nobody)) < 1e-5


@settings(deadline=None)
@given(PROBABILITIES)
def test_a_batch_needs_at_least_what_one_of_it_needs(probabilities):
    assert (union_demand(probabilities) >= probabilities.max(axis=0) - 1e-6).all()


def test_one_sequence_needs_what_it_needs():
    probabilities = np.random.default_rng(0).random((1, 3, 5))
    np.testing.assert_allclose(union_demand(probabilities), probabilities[0])
