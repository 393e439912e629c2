"""Windows against routing looked up token by token."""

import numpy as np
import pytest
import torch

from tests.training.toy_routing import toy_trace
from tests.training.toy_zoo import INTERLAYER, MULTISCALE, SMALL
from training.config import TrainConfig
from training.errors import ConfigInvalid
from training.plan import plan_step
from training.predictors import examples_of
from training.windows import WindowBatch, Windows

TRACE = toy_trace((13, 1, 20, 8), seed=3)
WINDOW = INTERLAYER.window


def all_of(block_tokens: int) -> tuple[Windows, WindowBatch]:
    windows = Windows(TRACE, block_tokens, INTERLAYER)
    return windows, windows.draw(np.arange(len(windows)), np.zeros(len(windows), bool))


@pytest.mark.parametrize("block_tokens", [1, 3, WINDOW])
def test_every_stretch_is_the_tokens_up_to_the_end_of_its_block(block_tokens: int) -> None:
    windows, batch = all_of(block_tokens)
    assert TRACE.gates is not None
    for block in range(len(windows)):
        first, length = int(windows.first[block]), int(windows.length[block])
        begin = max(int(start) for start in TRACE.starts if start <= first)
        for place in range(WINDOW):
            token = first + block_tokens - WINDOW + place
            present = begin <= token < first + length
            expected = np.zeros((TRACE.spec.num_layers, TRACE.spec.num_experts))
            if present:
                np.put_along_axis(expected, TRACE.experts[token].astype(int), TRACE.gates[token], -1)
            assert batch.present[block, place] == present
            np.testing.assert_allclose(batch.weights[block, place].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("block_tokens", [1, 3, WINDOW])
def test_every_token_is_scored_once_in_order(block_tokens: int) -> None:
    windows = Windows(TRACE, block_tokens, INTERLAYER)
    routed = torch.cat([batch.targets for batch in windows.in_order(10)]).numpy()
    assert np.array_equal(np.sort(TRACE.experts, -1).ravel(), np.argwhere(routed)[:, 2])


def test_without_gates_all_routed_experts_weigh_the_same() -> None:
    bare = Windows(toy_trace((9,), gates=False), WINDOW, INTERLAYER)
    hidden = Windows(toy_trace((9,)), WINDOW, INTERLAYER)
    nobody, everybody = np.zeros(len(bare), bool), np.ones(len(bare), bool)
    came, expected = bare.draw(np.arange(2), nobody), hidden.draw(np.arange(2), everybody)
    assert set(came.weights.unique().tolist()) == {0.0, 0.5}
    assert torch.equal(came.weights, expected.weights)


def test_blocks_longer_than_the_window_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"block_tokens is 9, expected at most the window \(8 tokens\)"):
        Windows(TRACE, 9, MULTISCALE)


@pytest.mark.parametrize("name", ["interlayer", "multiscale", "ensemble"])
def test_a_block_is_asked_with_the_same_layers_seen(name: str) -> None:
    config = TrainConfig(block_tokens=8, batch_tokens=32, prefixes=3)
    seen = plan_step(examples_of(TRACE, 8, SMALL[name]), config, 0).seen
    assert (seen == seen[:, :1]).all() and not seen[..., 0].any() and seen[..., 1:].any()
