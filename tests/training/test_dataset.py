"""Blocks against histories computed token by token."""

import numpy as np
import pytest

from tests.training.toy_routing import toy_trace
from traces.trace import RoutingTrace
from training.dataset import Blocks, gate_weights

DECAYS = (0.0, 0.5, 0.9)
TRACE = toy_trace((37, 5, 16, 1, 50), seed=3)


def naive_routing(trace: RoutingTrace, token: int, uniform: bool) -> np.ndarray:
    spec = trace.spec
    dense = np.zeros((spec.num_layers, spec.num_experts))
    for layer in range(spec.num_layers):
        total = 0.0 if trace.gates is None else trace.gates[token, layer].sum()
        for slot in range(spec.top_k):
            share = (
                1.0
                if uniform or trace.gates is None
                else spec.top_k * trace.gates[token, layer, slot] / total
            )
            dense[layer, trace.experts[token, layer, slot]] = 0.5 + 0.5 * share
    return dense


def naive_history(trace: RoutingTrace, uniform: bool) -> np.ndarray:
    spec = trace.spec
    history = np.zeros((trace.num_tokens, len(DECAYS), spec.num_layers, spec.num_experts))
    for sequence in range(trace.num_sequences):
        average = np.zeros(history.shape[1:])
        for token in range(trace.num_tokens)[trace.sequence(sequence)]:
            history[token] = average
            for scale, decay in enumerate(DECAYS):
                average[scale] = decay * average[scale] + (1 - decay) * naive_routing(trace, token, uniform)
    return history


@pytest.mark.parametrize("uniform", [False, True], ids=["gates", "no gates"])
@pytest.mark.parametrize("block_tokens", [1, 4, 64])
def test_blocks_equal_token_by_token_histories(block_tokens: int, uniform: bool) -> None:
    blocks = Blocks(TRACE, DECAYS, block_tokens, recent_tokens=2)
    batches = list(blocks.in_order(3, uniform_gates=uniform))
    history = np.concatenate([batch.history.numpy() for batch in batches])
    # Averages at a block's start are kept in half precision.
    np.testing.assert_allclose(history, naive_history(TRACE, uniform), atol=2e-3)
    routing = np.concatenate([batch.routing.numpy() for batch in batches])
    expected = np.stack([naive_routing(TRACE, token, uniform) for token in range(TRACE.num_tokens)])
    np.testing.assert_allclose(routing, expected, atol=1e-5)


def test_targets_are_the_routed_experts() -> None:
    blocks = Blocks(TRACE, DECAYS, 8, recent_tokens=0)
    targets = np.concatenate([batch.targets.numpy() for batch in blocks.in_order(2)])
    assert np.array_equal(np.sort(TRACE.experts, -1).ravel(), np.argwhere(targets)[:, 2])


def test_recent_ids_stop_at_the_start_of_the_sequence() -> None:
    assert TRACE.token_ids is not None
    blocks = Blocks(TRACE, DECAYS, 8, recent_tokens=2)
    first, third = TRACE.starts[1], TRACE.starts[1] + 2
    assert blocks.token_ids[first].tolist() == [TRACE.token_ids[first], -1, -1]
    assert blocks.token_ids[third].tolist() == TRACE.token_ids[[third, third - 1, third - 2]].tolist()


def test_every_token_is_in_one_block() -> None:
    blocks = Blocks(TRACE, DECAYS, 8, recent_tokens=0)
    covered = [np.arange(f, f + n) for f, n in zip(blocks.first, blocks.length, strict=True)]
    assert np.concatenate(covered).tolist() == list(range(TRACE.num_tokens))


def test_unknown_gates_weigh_like_equal_ones() -> None:
    equal = np.full((3, 2, 4), 0.25, np.float32)
    assert np.array_equal(gate_weights(None, equal.shape), gate_weights(equal, equal.shape))
