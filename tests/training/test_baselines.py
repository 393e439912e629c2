"""What each baseline forecasts, by hand and against naive references, and that none looks ahead."""

from dataclasses import replace

import numpy as np
import pytest

from tests.training.toy_routing import SPEC, toy_trace
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.baselines import (
    BASELINES,
    ExponentialAverage,
    LayerMarkov,
    NearestMaps,
    Popularity,
    Repeat,
    routing_maps,
)
from training.errors import BaselineNotFitted, SpecMismatch

TRAIN = toy_trace((200, 150, 250), seed=1)
TEST = toy_trace(seed=2)
CAUSAL = [name for name in BASELINES if name != "oracle"]


def hand_trace(routed: list[list[list[int]]], starts: list[int]) -> RoutingTrace:
    experts = np.array(routed, np.int16)
    spec = RoutingSpec("hand", experts.shape[1], 4, experts.shape[2])
    return RoutingTrace(spec, experts, None, None, np.array(starts, np.int64), ("x",) * (len(starts) - 1))


def shuffled(trace: RoutingTrace) -> RoutingTrace:
    """Every layer keeps its experts, handed to other tokens at random."""
    rng = np.random.default_rng(5)
    experts = np.stack([layer[rng.permutation(len(layer))] for layer in trace.experts.transpose(1, 0, 2)], 1)
    return replace(trace, experts=experts)


def recall(scores: np.ndarray, trace: RoutingTrace, layers: slice = slice(None)) -> float:
    first = np.argsort(-scores[:, layers], axis=-1, kind="stable")[..., : trace.spec.top_k]
    return float(np.take_along_axis(routing_maps(trace)[:, layers], first, axis=-1).mean())


def test_popularity_is_the_share_of_tokens_routed_to_each_expert() -> None:
    trace = hand_trace([[[0, 1]], [[0, 2]], [[0, 1]], [[0, 3]]], [0, 4])
    assert Popularity().fit(trace).scores(trace, 0)[2].tolist() == [[1.0, 0.5, 0.25, 0.25]]


def test_repeat_ranks_the_previous_tokens_experts_first_and_popular_ones_next() -> None:
    trace = hand_trace([[[0, 1]], [[0, 2]], [[0, 1]], [[2, 3]]], [0, 4])
    order = np.argsort(-Repeat().fit(trace).scores(trace, 0)[:, 0], axis=-1, kind="stable")
    assert order.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["repeat", "exponential average", "layer markov"])
def test_a_sequences_first_token_falls_back_to_popularity(name: str) -> None:
    scores = BASELINES[name]().fit(TRAIN).scores(TEST, 0)[TEST.starts[:-1]]
    popular = Popularity().fit(TRAIN).scores(TEST, 0)[TEST.starts[:-1]]
    assert np.array_equal(np.argsort(-scores, axis=-1), np.argsort(-popular, axis=-1))


def test_the_exponential_average_forgets_at_its_decay() -> None:
    baseline = ExponentialAverage().fit(TRAIN)
    baseline.decay = 0.75
    maps, popular = routing_maps(TEST), Popularity().fit(TRAIN).scores(TEST, 0)
    third = popular[0] * 0.75**2 + maps[0] * 0.25 * 0.75 + maps[1] * 0.25
    np.testing.assert_allclose(baseline.scores(TEST, 0)[2], third, rtol=1e-5)


def test_the_decay_is_the_one_with_the_best_recall_in_training() -> None:
    chosen = ExponentialAverage().fit(TRAIN)
    found = {}
    for decay in ExponentialAverage.DECAYS:
        other = ExponentialAverage().fit(TRAIN)
        other.decay = decay
        found[decay] = recall(other.scores(TRAIN, 0), TRAIN)
    assert found[chosen.decay] == pytest.approx(max(found.values()), abs=1e-3)


@pytest.mark.parametrize(("seen", "layer"), [(1, 1), (1, 3), (2, 2), (3, 3)])
def test_layer_markov_counts_what_goes_along_with_the_last_seen_layer(seen: int, layer: int) -> None:
    popular = Popularity().fit(TRAIN).scores(TRAIN, 0)[0, layer]
    expected = np.zeros(SPEC.num_experts)
    for source in TEST.experts[5, seen - 1]:
        came = (TRAIN.experts[:, seen - 1] == source).any(axis=1)
        together = routing_maps(TRAIN)[came, layer].sum(axis=0)
        expected += (together + 4 * popular) / (came.sum() + 4) / SPEC.top_k
    scores = LayerMarkov().fit(TRAIN).scores(TEST, seen)
    np.testing.assert_allclose(scores[5, layer], expected, rtol=1e-4)


def test_layer_markov_starts_from_the_previous_tokens_same_layer() -> None:
    popular = Popularity().fit(TRAIN).scores(TRAIN, 0)[0, 2]
    follows = np.setdiff1d(np.arange(TRAIN.num_tokens), TRAIN.starts)
    expected = np.zeros(SPEC.num_experts)
    for source in TEST.experts[4, 2]:
        after = follows[(TRAIN.experts[follows - 1, 2] == source).any(axis=1)]
        expected += (routing_maps(TRAIN)[after, 2].sum(axis=0) + 4 * popular) / (len(after) + 4) / SPEC.top_k
    np.testing.assert_allclose(LayerMarkov().fit(TRAIN).scores(TEST, 0)[5, 2], expected, rtol=1e-4)


def test_nearest_maps_finds_a_training_token_again() -> None:
    baseline = NearestMaps()
    baseline.NEAREST = 1
    scores = baseline.fit(TRAIN).scores(TRAIN, 3)
    # Three of four layers and the whole token before are alike: the rest nearly always is too.
    assert recall(scores, TRAIN, slice(3, None)) > 0.9


def test_nearest_maps_keeps_a_bounded_number_of_tokens() -> None:
    baseline = NearestMaps()
    baseline.KEPT = 50
    assert len(baseline.fit(TRAIN)._experts) == 50


def test_the_oracle_knows_everything() -> None:
    assert recall(BASELINES["oracle"]().fit(TRAIN).scores(TEST, 0), TEST) == 1.0


def test_random_finds_its_share() -> None:
    trace = toy_trace((2000,), seed=3)
    found = recall(BASELINES["random"]().fit(TRAIN).scores(trace, 0), trace)
    assert found == pytest.approx(SPEC.top_k / SPEC.num_experts, abs=0.02)


def test_structure_is_found_where_there_is_some() -> None:
    test = toy_trace((1000,), seed=2)
    found = {name: recall(BASELINES[name]().fit(TRAIN).scores(test, 1), test, slice(1, 2)) for name in CAUSAL}
    assert found["layer markov"] > found["popularity"] + 0.05 > found["random"] + 0.1


@pytest.mark.parametrize("name", ["layer markov", "nearest maps", "exponential average"])
def test_shuffled_targets_leave_nothing_but_popularity(name: str) -> None:
    train, test = shuffled(toy_trace((3000,), seed=1)), shuffled(toy_trace((3000,), seed=2))
    popular = recall(Popularity().fit(train).scores(test, 1), test, slice(1, None))
    found = recall(BASELINES[name]().fit(train).scores(test, 1), test, slice(1, None))
    assert found <= popular + 0.01


@pytest.mark.parametrize("seen", range(SPEC.num_layers))
@pytest.mark.parametrize("name", CAUSAL)
def test_no_score_changes_with_what_comes_later(name: str, seen: int) -> None:
    baseline, token = BASELINES[name]().fit(TRAIN), 25  # inside the third sequence
    other = toy_trace(seed=7).experts
    experts = TEST.experts.copy()
    experts[token, seen:] = other[token, seen:]
    experts[token + 1 :] = other[token + 1 :]
    changed = baseline.scores(replace(TEST, experts=experts), seen)
    assert np.array_equal(changed[: token + 1, seen:], baseline.scores(TEST, seen)[: token + 1, seen:])


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "random"])
def test_sequences_do_not_touch_each_other(name: str) -> None:
    baseline = BASELINES[name]().fit(TRAIN)
    alone = baseline.scores(TEST.select([2]), 1)
    np.testing.assert_allclose(alone, baseline.scores(TEST, 1)[TEST.sequence(2)], atol=1e-6)


@pytest.mark.parametrize("name", [name for name, kind in BASELINES.items() if kind().gives_probabilities])
@pytest.mark.parametrize("seen", [0, 2])
def test_probabilities_add_up_to_the_routed_experts(name: str, seen: int) -> None:
    scores = BASELINES[name]().fit(TRAIN).scores(TEST, seen)[:, seen:]
    np.testing.assert_allclose(scores.sum(axis=-1), SPEC.top_k, rtol=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_asking_before_fitting_is_refused(name: str) -> None:
    with pytest.raises(BaselineNotFitted, match=f"{name} has seen no training routing"):
        BASELINES[name]().scores(TEST, 0)


@pytest.mark.parametrize("name", BASELINES)
def test_a_trace_of_another_shape_is_refused(name: str) -> None:
    wide = toy_trace(spec=RoutingSpec("wide", 4, 16, 2))
    with pytest.raises(SpecMismatch, match=r"num_experts 16, expected 8"):
        BASELINES[name]().fit(TRAIN).scores(wide, 0)
