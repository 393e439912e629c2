"""Augmentation: what it changes, what it keeps, and that it is off unless asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.toy_routing import SPEC, toy_trace
from tests.training.toy_zoo import SMALL, TRAINING
from training.augmentation import Change, draw_change
from training.config import TrainConfig
from training.examples import Batch
from training.predictors import examples_of
from training.predictors.ensemble import JointBatch

TRACE = toy_trace((40, 19, 26), seed=5)
KINDS = ("prefix", "interlayer", "ensemble")


def drawn(name: str) -> tuple[Batch, torch.Tensor]:
    """All tokens in blocks of 8, some shorter, and the blocks' lengths."""
    examples = examples_of(TRACE, 8, SMALL[name])
    batch = examples.draw(np.arange(len(examples)), np.zeros(len(examples), bool))
    return batch, torch.from_numpy(examples.length)


def change_of(length: torch.Tensor, **knobs: float) -> Change:
    torch.manual_seed(1)
    change = draw_change(replace(TRAINING, **knobs), SPEC, length)
    assert change is not None
    return change


def inputs(batch: Batch) -> list[torch.Tensor]:
    """What a predictor is shown of routing, one row for each token or block."""
    if isinstance(batch, JointBatch):
        return [*inputs(batch.prefix), *inputs(batch.interlayer), *inputs(batch.multiscale)]
    names = ("routing", "averages", "repeats", "weights")
    return [tensor for name, tensor in vars(batch).items() if name in names]


@pytest.mark.parametrize("config", [TrainConfig(), TRAINING])
def test_it_is_off_unless_asked_for(config: TrainConfig) -> None:
    before = torch.get_rng_state()
    assert draw_change(config, SPEC, torch.tensor([8, 8])) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", KINDS)
def test_a_permutation_moves_inputs_and_targets_alike(name: str) -> None:
    batch, length = drawn(name)
    change = change_of(length, permute_experts=1.0)
    after, targets = batch.changed(change), change.targets(batch.targets)
    assert (targets.sum(-1) == SPEC.top_k).all() and not torch.equal(targets, batch.targets)
    for came, before in zip(inputs(after), inputs(batch), strict=True):
        torch.testing.assert_close(came.sort(-1).values, before.sort(-1).values)
    assert (after.token_ids == -1).all()
    if name == "prefix":  # the same permutation: what is shown of this token is its target
        assert torch.equal(inputs(after)[0][:, :, 0], targets)


@pytest.mark.parametrize("name", KINDS)
def test_only_the_chosen_share_of_blocks_is_permuted(name: str) -> None:
    batch, length = drawn(name)
    change = change_of(length, permute_experts=0.5)
    kept = ~change.permuted
    assert kept.any() and change.permuted.any()
    assert torch.equal(change.targets(batch.targets)[kept], batch.targets[kept])
    assert torch.equal(batch.changed(change).token_ids[kept], batch.token_ids[kept])


@pytest.mark.parametrize("name", ["prefix", "interlayer"])
def test_dropped_layers_tell_nothing_and_stay_targets(name: str) -> None:
    batch, length = drawn(name)
    change = change_of(length, drop_layers=0.5)
    after = batch.changed(change)
    told = after.routing[:, :, 0] if name == "prefix" else after.weights[:, -8:][after.inside]  # type: ignore[attr-defined]
    before = batch.routing[:, :, 0] if name == "prefix" else batch.weights[:, -8:][batch.inside]  # type: ignore[attr-defined]
    assert not told[change.dropped].any() and torch.equal(told[~change.dropped], before[~change.dropped])
    assert torch.equal(change.targets(batch.targets), batch.targets)


@pytest.mark.parametrize("name", KINDS)
def test_a_mixture_is_a_weighted_sum_of_two_tokens(name: str) -> None:
    batch, length = drawn(name)
    change = change_of(length, mixup=0.5)
    own = change.own[:, None, None]
    assert (change.own >= 0.5).all() and (change.partner != torch.arange(len(own))).any()
    expected = own * batch.targets + (1 - own) * batch.targets[change.partner]
    targets = change.targets(batch.targets)
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(targets.sum(-1), torch.full(targets.shape[:2], float(SPEC.top_k)))
    if name == "prefix":  # all of it is mixed as the targets are
        torch.testing.assert_close(inputs(batch.changed(change))[0][:, :, 0], expected)


def test_blocks_are_mixed_with_blocks_of_their_length() -> None:
    batch, length = drawn("interlayer")
    change = change_of(length, mixup=0.5)
    blocks = change.of_blocks(batch.first)  # type: ignore[attr-defined]
    assert torch.equal(length[blocks.partner], length)
    first = length.cumsum(0) - length
    assert torch.equal(change.partner[first], first[blocks.partner])


@pytest.mark.parametrize("name", KINDS)
def test_noise_keeps_zeros_and_the_mean(name: str) -> None:
    batch, length = drawn(name)
    change = change_of(length, noise=0.2)
    assert torch.equal(change.targets(batch.targets), batch.targets)
    for came, before in zip(inputs(batch.changed(change)), inputs(batch), strict=True):
        assert torch.equal(came == 0, before == 0) and not torch.equal(came, before)
        assert came.sum().item() == pytest.approx(before.sum().item(), abs=0.05 * before.abs().sum().item())
