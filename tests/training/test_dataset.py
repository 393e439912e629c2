"""Blocks against histories computed token by token."""

import numpy as np
import pytest

from tests.training.toy_routing import toy_trace
from traces.trace import RoutingTrace
from training.dataset import Blocks, gate_offsets

DECAYS = (0.0, 0.5, 0.9)
TRACE = toy_trace((37, 5, 16, 1, 50), seed=3)


def naive_routing(trace: RoutingTrace, token: int, hidden: bool) -> np.ndarray:
    spec = trace.spec
    dense = np.zeros((spec.num_layers, 2, spec.num_experts))
    for layer in range(spec.num_layers):
        assert trace.gates is not None
        logs = np.log(trace.gates[token, layer] / trace.gates[token, layer].sum())
        for slot in range(spec.top_k):
            expert = trace.experts[token, layer, slot]
            dense[layer, :, expert] = 1.0, 0.0 if hidden else logs[slot] - logs.mean()
    return dense


def naive_history(trace: RoutingTrace, hidden: bool) -> np.ndarray:
    spec = trace.spec
    history = np.zeros((trace.num_tokens, len(DECAYS), spec.num_layers, 2, spec.num_experts))
    for sequence in range(trace.num_sequences):
        average = np.zeros(history.shape[1:])
        for token in range(trace.num_tokens)[trace.sequence(sequence)]:
            history[token] = average
            for scale, decay in enumerate(DECAYS):
                average[scale] = decay * average[scale] + (1 - decay) * naive_routing(trace, token, hidden)
    return history


@pytest.mark.parametrize("hidden", [False, True], ids=["gates", "no gates"])
@pytest.mark.parametrize("block_tokens", [1, 4, 64])
def test_blocks_equal_token_by_token_histories(block_tokens: int, hidden: bool) -> None:
    blocks = Blocks(TRACE, DECAYS, block_tokens, recent_tokens=2)
    batch = blocks.draw(np.arange(len(blocks)), np.full(len(blocks), hidden))
    # Averages at a block's start are kept in half precision.
    np.testing.assert_allclose(batch.history.numpy(), naive_history(TRACE, hidden), atol=5e-3)
    expected = np.stack([naive_routing(TRACE, token, hidden) for token in range(TRACE.num_tokens)])
    np.testing.assert_allclose(batch.routing.numpy(), expected, atol=1e-5)


def test_gates_are_hidden_in_the_chosen_blocks_only() -> None:
    blocks = Blocks(TRACE, DECAYS, 8, recent_tokens=0)
    batch = blocks.draw(np.array([0, 1, 2]), np.array([False, True, False]))
    told = batch.routing[:, :, 1].abs().amax((1, 2)) > 0
    assert told.tolist() == [True] * 8 + [False] * 8 + [True] * 8


def test_targets_are_the_routed_experts() -> None:
    blocks = Blocks(TRACE, DECAYS, 8, recent_tokens=0)
    targets = np.concatenate([batch.targets.numpy() for batch in blocks.in_order(16)])
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


def test_equal_gates_tell_nothing() -> None:
    assert not gate_offsets(np.full((3, 2, 4), 0.25, np.float32)).any()


def test_gate_offsets_do_not_depend_on_the_scale_of_the_gates() -> None:
    gates = np.array([[0.6, 0.3, 0.1]])
    np.testing.assert_allclose(gate_offsets(gates), gate_offsets(7 * gates), atol=1e-6)
