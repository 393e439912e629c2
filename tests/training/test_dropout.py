"""Dropout: the share it was told, an unchanged mean, nothing outside training."""

import pytest
import torch

from training.dropout import dropout


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_dropped_and_the_mean_kept(share: float) -> None:
    torch.manual_seed(0)
    came = dropout(torch.ones(400, 503), share, training=True)
    assert (came == 0).float().mean().item() == pytest.approx(share, abs=0.01)
    assert came.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("share", "training"), [(0.5, False), (0.0, True)])
def test_otherwise_nothing_changes(share: float, training: bool) -> None:
    x = torch.randn(3, 5)
    assert dropout(x, share, training) is x
