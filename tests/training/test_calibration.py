"""Calibration: it finds what distorted the logits, and applies each pair where it belongs."""

import numpy as np
import pytest
import torch

from training.calibration import Calibration, fit, platt


def drawn(scale: float, bias: float, count: int = 60_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    z = rng.normal(-1, 2, count).astype(np.float32)
    return z, rng.random(count) < 1 / (1 + np.exp(-(scale * z + bias)))


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (0.5, -0.7), (1.6, 0.4)])
def test_platt_scaling_finds_the_distortion(scale: float, bias: float) -> None:
    assert platt(*drawn(scale, bias)) == pytest.approx((scale, bias), abs=0.06)


@pytest.mark.parametrize("outcome", [False, True], ids=["never", "always"])
def test_outcomes_that_never_vary_stay_finite(outcome: bool) -> None:
    z, _ = drawn(1.0, 0.0, 500)
    assert np.isfinite(platt(z, np.full(500, outcome))).all()


def test_distances_are_fitted_on_their_own() -> None:
    layers, experts, tokens = 3, 4, 4000
    rng = np.random.default_rng(1)
    z = rng.normal(-1, 1.5, (tokens, 1, layers, experts)).repeat(layers, axis=1).astype(np.float16)
    targets = rng.random((tokens, layers, experts)) < 1 / (1 + np.exp(-z[:, 0].astype(np.float32)))
    z[:, 1:] *= 2  # once a layer is seen, the logits are twice too sure
    scale, _ = fit(z, targets)
    np.testing.assert_allclose(scale[0], 1.0, atol=0.12)
    np.testing.assert_allclose([scale[1, 1], scale[1, 2], scale[2, 2]], 0.5, atol=0.06)
    assert scale[1, 1] == scale[2, 2] != scale[1, 2]  # distance 1 and distance 2


def test_tables_are_looked_up_by_layers_seen_and_token_known() -> None:
    calibration = Calibration(2)
    calibration.set_tables(True, np.full((2, 2), 2.0, np.float32), np.array([[0, 0], [0, 5]], np.float32))
    logits = torch.ones(3, 2, 1)
    came = calibration(logits, torch.tensor([0, 1, 1]), torch.tensor([False, False, True]))
    expected = torch.sigmoid(torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 7.0]]))
    torch.testing.assert_close(came[..., 0], expected)
