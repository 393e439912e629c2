"""How many tokens a survey asks, and how many experts it takes to cover what it found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.toy_run import PREDICTOR, VALIDATION
from tests.training.toy_zoo import INTERLAYER, untrained
from training import survey as surveying
from training.predictor_configs import PredictorConfig
from training.predictors import examples_of
from training.survey import LEVELS, Survey, coverage, survey


@pytest.mark.parametrize(
    ("config", "expected"), [(PREDICTOR, 50), (INTERLAYER, 10)], ids=["prefix", "interlayer"]
)
def test_only_windows_are_sampled(
    monkeypatch: pytest.MonkeyPatch, config: PredictorConfig, expected: int
) -> None:
    monkeypatch.setattr(surveying, "MAX_WINDOWED_TOKENS", 10)
    blocks = examples_of(VALIDATION, 1, config)
    found = survey(untrained(config, VALIDATION), blocks, token_ids=False)
    assert len(found.targets) == expected
    assert np.isfinite(found.logits[:, 0]).all()


TOKENS, LAYERS = 400, 6


def surveyed(needed: np.ndarray) -> Survey:
    """Of tokens that need so many experts, [N, L, L]."""
    tokens, layers, _ = needed.shape
    nothing = np.zeros((tokens, layers, 1), bool)
    return Survey(np.zeros((tokens, layers, layers, 1), np.float16), nothing, needed.astype(np.int16))


@given(seed=st.integers(0, 2**32 - 1), level=st.sampled_from(range(len(LEVELS))), most=st.integers(1, 40))
def test_layers_at_a_distance_are_covered_together_and_hardly_more(seed: int, level: int, most: int) -> None:
    needed = np.random.default_rng(seed).integers(2, 2 + most, (TOKENS, LAYERS, LAYERS))
    sizes = coverage(surveyed(needed)).experts[level]
    must = int(np.ceil((TOKENS + 1) * LEVELS[level]))
    for distance in range(LAYERS):  # 0: token start
        seen = [layer + 1 - distance if distance else 0 for layer in range(distance, LAYERS)]
        cells = [needed[:, s, layer] for s, layer in zip(seen, range(distance, LAYERS), strict=True)]
        chosen = [sizes[layer][layer - s] for s, layer in zip(seen, range(distance, LAYERS), strict=True)]
        covered = [int((cell <= size).sum()) for cell, size in zip(cells, chosen, strict=True)]
        one_less = [int((cell < size).sum()) for cell, size in zip(cells, chosen, strict=True)]
        surplus = sum(covered) - must * len(cells)
        assert surplus >= 0
        # Otherwise the last layer would have one fewer.
        assert surplus < max(np.subtract(covered, one_less))


def test_a_single_layer_has_the_conformal_size() -> None:
    needed = np.arange(1, 100)[:, None, None]
    assert coverage(surveyed(needed)).experts == tuple(((n,),) for n in (90, 95, 99))
