"""The loss: what it comes to for routers that pick one expert, and for mixed targets."""

import math

import pytest
import torch
from torch.nn import functional

from training.loss import LEVEL, NEAREST, set_loss, top_one_loss, unseen, weighted, weighted_next

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
    expected = [[[1, 1, 1], [0, 0, 1 + near]], [[1, 1, 1], [0, 1 + near, 1 + near]]]
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


def test_a_routed_expert_is_to_be_ahead_of_those_that_are_not_routed() -> None:
    logits, routed = torch.randn(3, 6), torch.tensor([[0, 1], [4, 2], [5, 0]])
    targets = functional.one_hot(routed, 6).sum(1).float()
    expected = torch.zeros(())
    for layer, chosen in enumerate(routed):
        z, others = logits[layer], targets[layer] == 0
        for expert in chosen:  # the cross-entropy over it and the others, without its companion
            expected += functional.cross_entropy(torch.cat([z[expert, None], z[others]]), torch.tensor(0)) / 2
        level = functional.binary_cross_entropy_with_logits(z, targets[layer], reduction="sum")
        expected += LEVEL * level / 2
    came = set_loss(logits[None, None], targets[None], torch.ones(1, 1, 3))
    torch.testing.assert_close(came, expected)


def test_routed_experts_do_not_compete_with_each_other() -> None:
    logits = torch.tensor([2.0, 1.0, -1.0, -3.0], requires_grad=True)
    targets, weight = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.ones(1, 1, 1)
    ahead = torch.tensor([9.0, 0.0, 0.0, 0.0])
    level = functional.binary_cross_entropy_with_logits(logits + ahead, targets[0, 0], reduction="sum") / 2
    loss = set_loss((logits + ahead)[None, None, None], targets, weight)
    (push,) = torch.autograd.grad(loss - LEVEL * level, logits)
    # The first is far ahead: it is pushed no further, and the second one is not pushed back for it.
    assert abs(float(push[0])) < 1e-3 and float(push[1]) < -1e-2


def test_an_expert_that_is_routed_to_in_part_is_in_part_among_the_others() -> None:
    logits, weight = torch.zeros(1, 1, 1, 3), torch.ones(1, 1, 1)
    mixed = torch.tensor([[[0.75, 0.25, 0.0]]])
    others = math.log(0.25 + 0.75 + 1)
    behind = math.log1p(math.exp(others))
    assert float(set_loss(logits, mixed, weight)) == pytest.approx(behind + LEVEL * 3 * math.log(2), rel=1e-5)


def test_if_all_experts_are_routed_to_the_loss_stays_a_number() -> None:
    logits = torch.randn(1, 1, 1, 4, requires_grad=True)
    (push,) = torch.autograd.grad(set_loss(logits, torch.ones(1, 1, 4), torch.ones(1, 1, 1)), logits)
    assert bool(push.isfinite().all())


def test_the_loss_of_a_mixture_is_the_mixture_of_losses_where_one_expert_is_routed_to() -> None:
    logits, weight = torch.randn(2, 2, 3, 5), unseen(SEEN, 3)
    one, other = (functional.one_hot(torch.randint(5, (2, 3)), 5).float() for _ in range(2))
    expected = 0.7 * top_one_loss(logits, one, weight) + 0.3 * top_one_loss(logits, other, weight)
    torch.testing.assert_close(top_one_loss(logits, 0.7 * one + 0.3 * other, weight), expected)
