"""The loss: what it comes to for routers that pick one expert, and for mixed targets."""

import math

import pytest
import torch
from torch.nn import functional

from training.loss import NEAR, NEAREST, set_loss, top_one_loss, unseen, weighted, weighted_next

SEEN = torch.tensor([[0, 2], [0, 1]])


def test_with_one_routed_expert_it_is_the_cross_entropy() -> None:
    logits, expert = torch.randn(2, 2, 3, 5), torch.randint(5, (2, 3))
    weight = unseen(SEEN, 3)
    came = top_one_loss(logits, functional.one_hot(expert, 5).float(), weight)
    rows = weight.bool()
    expected = functional.cross_entropy(logits[rows], expert[:, None].expand(2, 2, 3)[rows], reduction="sum")
    torch.testing.assert_close(came, expected)


def test_the_next_layers_count_more_once_layers_were_seen() -> None:
    near = 2.0
    fading = [near * math.exp(-ahead / NEAR) for ahead in range(2)]
    expected = [[[1, 1, 1], [0, 0, 1 + near]], [[1, 1, 1], [0, 1 + fading[0], 1 + fading[1]]]]
    torch.testing.assert_close(weighted(SEEN, 3, near), torch.tensor(expected))
    torch.testing.assert_close(weighted(SEEN, 3, 0.0), unseen(SEEN, 3))


def test_layers_far_ahead_count_no_more_than_usual() -> None:
    weights = weighted(torch.tensor([[2]]), 2 + NEAREST + 3, 5.0)[0, 0]
    assert weights[2 + NEAREST - 1] > 1
    assert weights[2 + NEAREST :].tolist() == [1, 1, 1]


def test_every_prefix_comes_to_the_same_as_drawn_ones_on_average() -> None:
    layers, near, prefixes = 9, 2.5, 4
    every = torch.arange(layers)[None]
    more = (weighted(every, layers, near) - unseen(every, layers))[0]  # by prefix and layer
    came = weighted_next(layers, near, prefixes)
    for early in range(NEAREST):
        for layer in range(layers):
            mean = more[layer - early, layer] / layers if layer >= early else 0.0
            assert float(came[early, layer]) == pytest.approx(float(mean * (prefixes - 1)), abs=1e-6)


@pytest.mark.parametrize("loss", [set_loss, top_one_loss])
def test_answers_of_several_are_scored_alone_and_added_up(loss: object) -> None:
    assert callable(loss)
    logits, weight = torch.randn(3, 2, 2, 3, 5), unseen(SEEN, 3)
    targets = functional.one_hot(torch.randint(5, (2, 3)), 5).float()
    expected = sum(loss(member, targets, weight) for member in logits)
    torch.testing.assert_close(loss(logits, targets, weight), expected)


@pytest.mark.parametrize("loss", [set_loss, top_one_loss])
def test_the_loss_of_a_mixture_is_the_mixture_of_losses(loss: object) -> None:
    assert callable(loss)
    logits, weight = torch.randn(2, 2, 3, 5), unseen(SEEN, 3)
    one, other = (functional.one_hot(torch.randint(5, (2, 3)), 5).float() for _ in range(2))
    expected = 0.7 * loss(logits, one, weight) + 0.3 * loss(logits, other, weight)
    torch.testing.assert_close(loss(logits, 0.7 * one + 0.3 * other, weight), expected)
