"""Blocks against histories computed token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.toy_routing import toy_trace
from traces.trace import RoutingTrace
from training.config import PrefixConfig
from training.dataset import Blocks, by_gate, gate_offsets

DECAYS = (0.0, 0.5, 0.9)
CONFIG = PrefixConfig(decays=DECAYS, recent_tokens=2, window=8, repeats=3, repeat_decay=0.5)
TRACE = toy_trace((37, 5, 16, 1, 50), seed=3)


def naive_routing(trace: RoutingTrace, token: int) -> np.ndarray:
    """[L, 2, E]: routed or not, and how far each gate is above an equal share."""
    spec = trace.spec
    dense = np.zeros((spec.num_layers, 2, spec.num_experts))
    for layer in range(spec.num_layers):
        assert trace.gates is not None
        shares = trace.gates[token, layer] / trace.gates[token, layer].sum()
        for slot in range(spec.top_k):
            dense[layer, :, trace.experts[token, layer, slot]] = 1.0, spec.top_k * shares[slot] - 1
    return dense


def naive_averages(trace: RoutingTrace) -> np.ndarray:
    spec = trace.spec
    averages = np.zeros((trace.num_tokens, len(DECAYS), spec.num_layers, spec.num_experts))
    for sequence in range(trace.num_sequences):
        average = np.zeros(averages.shape[1:])
        for token in range(trace.num_tokens)[trace.sequence(sequence)]:
            averages[token] = average
            for scale, decay in enumerate(DECAYS):
                routed, above = naive_routing(trace, token).transpose(1, 0, 2)
                average[scale] = decay * average[scale] + (1 - decay) * (routed + above)
    return averages


def by_rank(trace: RoutingTrace, token: int) -> np.ndarray:
    """[L, E]: of each routed expert 1.5, 0.5 or what is between, by how many have a larger gate."""
    spec = trace.spec
    dense = np.zeros((spec.num_layers, spec.num_experts))
    assert trace.gates is not None
    for layer, gates in enumerate(trace.gates[token].tolist()):
        strongest_first = sorted(range(spec.top_k), key=lambda slot: -gates[slot])
        for rank, slot in enumerate(strongest_first):
            dense[layer, trace.experts[token, layer, slot]] = 1.5 - rank / (spec.top_k - 1)
    return dense


def naive_repeats(trace: RoutingTrace, order: int) -> np.ndarray:
    """By comparing each token with all before it: the same id, and `order` ids before it, too."""
    assert trace.token_ids is not None
    ids, repeats = (
        trace.token_ids,
        np.zeros((trace.num_tokens, trace.spec.num_layers, trace.spec.num_experts)),
    )
    for sequence in range(trace.num_sequences):
        tokens = trace.sequence(sequence)
        for token in range(tokens.start, tokens.stop):
            places = [
                place
                for place in range(max(tokens.start, token - CONFIG.window), token)
                if all(
                    place - back >= tokens.start and ids[place - back] == ids[token - back]
                    for back in range(order + 1)
                )
            ]
            newest = places[::-1][: CONFIG.repeats]
            total = sum(CONFIG.repeat_decay**rank for rank in range(CONFIG.repeats))
            for rank, place in enumerate(newest):
                repeats[token] += CONFIG.repeat_decay**rank / total * by_rank(trace, place)
    return repeats


@pytest.mark.parametrize("block_tokens", [1, 4, 64])
def test_blocks_equal_token_by_token_averages(block_tokens: int) -> None:
    blocks = Blocks(TRACE, block_tokens, CONFIG)
    batch = blocks.draw(np.arange(len(blocks)), np.zeros(len(blocks), bool))
    # Averages at a block's start are kept in half precision.
    np.testing.assert_allclose(batch.averages.numpy(), naive_averages(TRACE), atol=1e-3)
    expected = np.stack([naive_routing(TRACE, token) for token in range(TRACE.num_tokens)])
    np.testing.assert_allclose(batch.routing.numpy(), expected, atol=1e-5)


def test_repeats_are_the_routing_of_the_newest_places_of_the_same_id() -> None:
    batch = next(Blocks(TRACE, 8, CONFIG).in_order(8 * TRACE.num_tokens))
    for order in range(2):
        expected = naive_repeats(TRACE, order)
        assert expected.any()
        np.testing.assert_allclose(batch.repeats[:, order].numpy(), expected, atol=1e-6)


def test_without_token_ids_nothing_repeats() -> None:
    batch = next(Blocks(toy_trace(token_ids=False), 8, CONFIG).in_order(100))
    assert not batch.repeats.any() and (batch.token_ids == -1).all()


def test_gates_are_hidden_in_the_chosen_blocks_only() -> None:
    batch = Blocks(TRACE, 8, CONFIG).draw(np.array([0, 1, 2]), np.array([False, True, False]))
    told = batch.routing[:, :, 1].abs().amax((1, 2)) > 0
    assert told.tolist() == [True] * 8 + [False] * 8 + [True] * 8


def test_what_is_hidden_is_gone_and_nothing_else() -> None:
    batch = Blocks(TRACE, 8, CONFIG).draw(np.array([1, 2]), np.zeros(2, bool))
    history, ids = torch.arange(16) % 4 == 1, torch.arange(16) % 4 == 2
    hidden = batch.hiding(history, ids)
    assert not hidden.averages[history].any() and not hidden.repeats[history | ids].any()
    assert (hidden.token_ids[ids] == -1).all()
    assert torch.equal(hidden.averages[~history], batch.averages[~history])
    assert torch.equal(hidden.repeats[~(history | ids)], batch.repeats[~(history | ids)])
    assert torch.equal(hidden.token_ids[~ids], batch.token_ids[~ids])


def test_targets_are_the_routed_experts() -> None:
    blocks = Blocks(TRACE, 8, CONFIG)
    targets = np.concatenate([batch.targets.numpy() for batch in blocks.in_order(16)])
    assert np.array_equal(np.sort(TRACE.experts, -1).ravel(), np.argwhere(targets)[:, 2])


def test_recent_ids_stop_at_the_start_of_the_sequence() -> None:
    assert TRACE.token_ids is not None
    blocks = Blocks(TRACE, 8, CONFIG)
    first, third = TRACE.starts[1], TRACE.starts[1] + 2
    assert blocks.token_ids[first].tolist() == [TRACE.token_ids[first], -1, -1]
    assert blocks.token_ids[third].tolist() == TRACE.token_ids[[third, third - 1, third - 2]].tolist()


def test_every_token_is_in_one_block() -> None:
    blocks = Blocks(TRACE, 8, CONFIG)
    covered = [np.arange(f, f + n) for f, n in zip(blocks.first, blocks.length, strict=True)]
    assert np.concatenate(covered).tolist() == list(range(TRACE.num_tokens))


def test_equal_gates_tell_nothing() -> None:
    assert not gate_offsets(np.full((3, 2, 4), 0.25, np.float32)).any()


def test_gate_offsets_do_not_depend_on_the_scale_of_the_gates() -> None:
    gates = np.array([[0.6, 0.3, 0.1]])
    np.testing.assert_allclose(gate_offsets(gates), gate_offsets(7 * gates), atol=1e-6)


def test_experts_come_by_falling_gate_where_gates_are_known() -> None:
    gates = TRACE.gates
    assert gates is not None and (np.diff(gates, axis=-1) < 0).any()
    strongest_last = replace(TRACE, experts=TRACE.experts[..., ::-1], gates=gates[..., ::-1])
    expected = next(Blocks(TRACE, 4, CONFIG).in_order(TRACE.num_tokens))
    came = next(Blocks(strongest_last, 4, CONFIG).in_order(TRACE.num_tokens))
    for name, tensor in vars(came).items():
        np.testing.assert_array_equal(tensor, getattr(expected, name), err_msg=name)
    ungated = replace(strongest_last, gates=None)
    assert by_gate(ungated) is ungated
