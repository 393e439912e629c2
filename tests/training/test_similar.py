"""Which earlier tokens are like the present one, by plain loops, and what is foretold by them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.toy_routing import SPEC, toy_trace
from tests.training.toy_run import PREDICTOR
from training.augmentation import draw_change
from training.config import TrainConfig
from training.dataset import Blocks
from training.repeats import spread
from training.similar import (
    ABSENT,
    LEAST,
    NEVER,
    PRESENT,
    SAME_ID,
    SAME_PAIR,
    MostSimilar,
    Window,
    scores,
    shared,
    without_ids,
)

TRACE = toy_trace((30, 12, 1), seed=9)
WINDOW = 8
WEIGHTS = (0.1, 0.7, 2.0, 0.5, -0.3, 0.04, 0.02)
DECAYS = (0.0, 0.5)
RANKS = torch.linspace(1.5, 0.5, SPEC.top_k)


def in_common(token: int, back: int) -> int:
    """Of the token so many before this one."""
    starts, ids = TRACE.starts, TRACE.token_ids
    assert ids is not None
    begin = int(starts[np.searchsorted(starts, token, side="right") - 1])
    other = token - back
    if other < begin:
        return ABSENT
    if ids[other] != ids[token]:
        return PRESENT
    return SAME_PAIR if other > begin and ids[other - 1] == ids[token - 1] else SAME_ID


def test_what_a_window_has_in_common_is_what_plain_loops_find() -> None:
    tokens = np.arange(TRACE.num_tokens)
    window = Window(TRACE, WINDOW)
    expected = [[in_common(token, back) for back in range(1, WINDOW + 1)] for token in tokens.tolist()]
    alike = window.alike(tokens)
    assert alike.tolist() == expected
    assert {ABSENT, PRESENT, SAME_ID, SAME_PAIR} == set(np.unique(alike))
    token, back = np.argwhere(alike > ABSENT)[-1]
    assert np.array_equal(window.experts(tokens)[token, back], TRACE.experts[token - back - 1])


def in_both(token: int, other: int) -> int:
    """How many experts two tokens share, over all layers."""
    rows = zip(TRACE.experts[token].tolist(), TRACE.experts[other].tolist(), strict=True)
    return sum(len(set(ours) & set(theirs)) for ours, theirs in rows)


@pytest.mark.parametrize("at_once", [256, 5])
@pytest.mark.parametrize("block_tokens", [1, 4])
def test_preceding_tokens_are_compared_at_the_same_distance(
    block_tokens: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.similar.AT_ONCE", at_once)
    config = replace(PREDICTOR, window=WINDOW, similar=2, preceding_decays=DECAYS)
    blocks = Blocks(TRACE, block_tokens, config)
    came = blocks.draw(np.arange(len(blocks)), np.zeros(len(blocks), bool)).preceding.numpy()
    expected = np.zeros((TRACE.num_tokens, len(DECAYS), WINDOW))
    for sequence in range(TRACE.num_sequences):
        tokens = TRACE.sequence(sequence)
        for token, back in np.ndindex(tokens.stop - tokens.start, WINDOW):
            for before in range(1, token + 1):
                if token - before - back - 1 >= 0:
                    both = in_both(tokens.start + token - before, tokens.start + token - before - back - 1)
                    weights = [(1 - decay) * decay ** (before - 1) for decay in DECAYS]
                    expected[tokens.start + token, :, back] += np.multiply(both, weights)
    assert expected.any()
    np.testing.assert_allclose(came, expected, rtol=1e-3)  # kept in half precision at a block's start


def test_without_ids_there_are_tokens_and_nothing_in_common() -> None:
    tokens = np.arange(TRACE.num_tokens)
    alike = Window(TRACE, WINDOW).alike(tokens)
    unknown = Window(replace(TRACE, token_ids=None), WINDOW).alike(tokens)
    assert np.array_equal(unknown, np.minimum(alike, PRESENT))
    hidden = torch.from_numpy(tokens % 2 == 0)
    some = without_ids(torch.from_numpy(alike), hidden).numpy()
    assert np.array_equal(some, np.where(tokens[:, None] % 2, alike, unknown))


def made_up(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(routed [2, L, E], window [2, W, L, K]) of two tokens."""
    rng = np.random.default_rng(seed)
    drawn = rng.permuted(np.tile(np.arange(SPEC.num_experts), (2, WINDOW + 1, SPEC.num_layers, 1)), axis=-1)
    experts = torch.from_numpy(drawn[..., : SPEC.top_k])
    routed = torch.zeros(2, SPEC.num_layers, SPEC.num_experts).scatter_(-1, experts[:, 0], 1.0)
    return routed, experts[:, 1:]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, SPEC.num_layers))
def test_a_score_is_what_plain_loops_add_up(seed: int, seen: int) -> None:
    routed, window = made_up(seed)
    alike = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (2, WINDOW)))
    by_layer = shared(routed, window).transpose(1, 2)
    fading = torch.tensor(
        [0.5 ** (seen - 1 - layer) if layer < seen else 0.0 for layer in range(SPEC.num_layers)]
    )
    plain, lately = ((fading > 0).float() @ by_layer)[:, None], (fading @ by_layer)[:, None]
    preceding = torch.rand(2, len(DECAYS), WINDOW, generator=torch.manual_seed(seed)) * 9
    came = scores(torch.tensor(WEIGHTS).expand(2, 1, -1), alike, plain, lately, preceding)
    of_expert, of_late, of_id, of_pair, of_age, *of_preceding = WEIGHTS
    for token, place in np.ndindex(2, WINDOW):
        kind = int(alike[token, place])
        score = of_age * np.log(place + 1) + of_id * (kind >= SAME_ID) + of_pair * (kind == SAME_PAIR)
        score += np.dot(of_preceding, preceding[token, :, place].tolist())
        for layer in range(seen):
            now = set(routed[token, layer].nonzero().ravel().tolist())
            both = len(now & set(window[token, place, layer].tolist()))
            score += both * (of_expert + of_late * 0.5 ** (seen - 1 - layer))
        assert float(came[token, 0, place]) == pytest.approx(score if kind else NEVER, abs=1e-4)


def test_the_best_ones_routing_is_added_up_by_their_scores() -> None:
    _, window = made_up(1)
    score = torch.full((2, 1, WINDOW), NEVER)
    score[0, 0, 5], score[0, 0, 2], score[0, 0, 1] = 2.0, 1.0, 0.5
    came = MostSimilar.by(score, 2, RANKS).routing(window, SPEC.num_experts) - LEAST
    total = np.exp(2) + np.exp(1) + 1  # one stands for none of them
    weights = torch.tensor([[np.exp(2) / total, np.exp(1) / total]], dtype=torch.float32)
    expected = torch.zeros(1, SPEC.num_layers, SPEC.num_experts)
    for (place, weight), layer, rank in itertools.product(
        zip((5, 2), weights[0].tolist(), strict=True), range(SPEC.num_layers), range(SPEC.top_k)
    ):
        expected[0, layer, window[0, place, layer, rank]] += weight * RANKS[rank]
    torch.testing.assert_close(came[:1, 0], expected)
    torch.testing.assert_close(came[1], torch.zeros_like(came[1]))  # of nobody


def test_routing_of_one_layer_is_that_of_all_layers_there() -> None:
    _, window = made_up(2)
    similar = MostSimilar.by(torch.randn(2, SPEC.num_layers, WINDOW), 3, RANKS)
    of_all = similar.routing(window, SPEC.num_experts)
    for early in range(SPEC.num_layers):
        came = similar.routing_ahead(window, early, SPEC.num_experts)
        torch.testing.assert_close(came, of_all.diagonal(early, 1, 2).mT)
    some = torch.tensor([[2, 0], [1, 1]])
    torch.testing.assert_close(
        similar.of(some).routing(window, SPEC.num_experts), of_all[torch.arange(2)[:, None], some]
    )


def test_permuted_experts_are_permuted_in_the_window_too() -> None:
    blocks = Blocks(TRACE, 4, replace(PREDICTOR, similar=2))
    batch = blocks.draw(np.arange(3), np.zeros(3, bool))
    torch.manual_seed(0)
    change = draw_change(TrainConfig(permute_experts=1.0), TRACE.spec, torch.from_numpy(blocks.length[:3]))
    assert change is not None
    changed = batch.changed(change)
    ones = torch.ones(batch.window.shape[:2])
    before = spread(batch.window, ones, RANKS, SPEC.num_experts)[:, None]
    torch.testing.assert_close(
        spread(changed.window, ones, RANKS, SPEC.num_experts)[:, None], change.inputs(before)
    )
    assert int(changed.alike.max()) == PRESENT < int(batch.alike.max())


def test_who_does_not_look_is_shown_nothing() -> None:
    batch = next(Blocks(TRACE, 4, replace(PREDICTOR, similar=0)).in_order(8))
    assert batch.window.shape[1] == batch.alike.shape[1] == 0
