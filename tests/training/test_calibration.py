"""Calibration: it finds what distorted the logits, and applies each pair where it belongs."""

import numpy as np
import pytest
import torch

from training.calibration import KNOT, Calibration, fit, levelled, log_odds, three_slopes

Distortion = tuple[float, float, float, float]


def drawn(distortion: Distortion, count: int = 60_000) -> tuple[np.ndarray, np.ndarray]:
    below, between, above, bias = distortion
    rng = np.random.default_rng(0)
    z = rng.normal(-0.5, 3, count).astype(np.float32)
    inside = np.clip(z, -KNOT, KNOT)
    logit = bias + between * inside + np.where(z < 0, below, above) * (z - inside)
    return z, rng.random(count) < 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize(
    "distortion", [(1.0, 1.0, 1.0, 0.0), (0.6, 0.6, 0.6, -0.5), (1.1, 1.3, 0.7, -0.3), (0.5, 1.2, 0.9, 0.2)]
)
def test_the_distortion_is_found(distortion: Distortion) -> None:
    assert three_slopes(*drawn(distortion)) == pytest.approx(distortion, abs=0.12)


@pytest.mark.parametrize("outcome", [False, True], ids=["never", "always"])
def test_outcomes_that_never_vary_stay_finite_and_in_order(outcome: bool) -> None:
    z, _ = drawn((1.0, 1.0, 1.0, 0.0), 500)
    *slopes, bias = three_slopes(z, np.full(500, outcome))
    assert min(slopes) > 0 and np.isfinite(bias)


def test_distances_are_fitted_on_their_own() -> None:
    layers, experts, tokens = 3, 4, 4000
    rng = np.random.default_rng(1)
    z = rng.normal(-1, 1.5, (tokens, 1, layers, experts)).repeat(layers, axis=1).astype(np.float16)
    targets = rng.random((tokens, layers, experts)) < 1 / (1 + np.exp(-z[:, 0].astype(np.float32)))
    z[:, 1:] *= 2  # once a layer is seen, the logits are twice too sure
    slope = fit(z, targets)[:, 1]
    np.testing.assert_allclose(slope[0], 1.0, atol=0.15)
    np.testing.assert_allclose([slope[1, 1], slope[1, 2], slope[2, 2]], 0.5, atol=0.08)
    assert slope[1, 1] == slope[2, 2] != slope[1, 2]  # distance 1 and distance 2


def test_tables_are_looked_up_by_layers_seen_and_token_known() -> None:
    calibration = Calibration(2, top_k=2)
    tables = np.tile(np.array([3.0, 2.0, 4.0, 0.0], np.float32)[:, None], (2, 1, 2))
    tables[1, 3, 1] = 5.0  # one layer seen, target layer 1: bias 5
    calibration.set_tables(True, tables)
    logits = torch.tensor([1.0, -1.0, 1.0])[:, None, None].expand(3, 2, 1)
    row = calibration.first_row(torch.tensor([False, False, True])) + torch.tensor([0, 1, 1])
    came = calibration(logits, row)
    expected = torch.sigmoid(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2.0, 7.0]]))
    torch.testing.assert_close(came[..., 0], expected)
    far = calibration(torch.tensor([-3.0, 3.0])[:, None, None].expand(2, 2, 1), row[2:].expand(2))
    expected = torch.sigmoid(torch.tensor([[-7.0, -2.0], [8.0, 13.0]]))
    torch.testing.assert_close(far[..., 0], expected)


def test_log_odds_are_those_of_the_softmax() -> None:
    logits = torch.randn(3, 2, 6) * 3
    torch.testing.assert_close(torch.sigmoid(log_odds(logits)), logits.softmax(-1))


def test_log_odds_of_a_sure_forecast_stay_finite_and_in_order() -> None:
    odds = log_odds(torch.tensor([200.0, 100.0, 0.0, -300.0]))
    assert odds.isfinite().all() and (odds[:-1] > odds[1:]).all()


def test_only_one_routed_expert_makes_logits_a_distribution() -> None:
    logits = torch.randn(2, 5)
    assert torch.equal(levelled(logits, 2), logits) and torch.equal(levelled(logits, 1), log_odds(logits))


def test_the_level_of_a_softmax_means_nothing() -> None:
    calibration, row = Calibration(1, top_k=1), torch.zeros(3, dtype=torch.int32)
    logits = torch.randn(3, 1, 5)
    torch.testing.assert_close(calibration(logits, row), calibration(logits + 7, row))
    torch.testing.assert_close(calibration(logits, row), logits.softmax(-1))
