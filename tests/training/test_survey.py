"""How many tokens a survey asks, and how many experts it takes to cover what it found."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.coverage import all_sets
from tests.training.toy_run import PREDICTOR, VALIDATION
from tests.training.toy_zoo import INTERLAYER, untrained
from training import survey as surveying
from training.calibration import Calibration
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


TOKENS, LAYERS, EXPERTS, K = 400, 4, 12, 2


def surveyed(seed: int, tokens: int = TOKENS) -> Survey:
    """Made-up logits, and routing that they say something of."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, 2, (tokens, LAYERS, LAYERS, EXPERTS)).astype(np.float16)
    noisy = logits[:, 0] + rng.gumbel(size=(tokens, LAYERS, EXPERTS))
    targets = noisy >= np.sort(noisy, axis=-1)[..., -K, None]
    worst = np.where(targets[:, None], logits, np.inf).min(axis=-1, keepdims=True)
    return Survey(logits, targets, (logits >= worst).sum(axis=-1).astype(np.int16))


def stretching(seed: int) -> Calibration:
    """A calibration with other numbers for every number of layers seen."""
    rng = np.random.default_rng(seed)
    calibration = Calibration(LAYERS, K)
    tables = rng.uniform([[0.5]] * 3 + [[-1.0]], [[1.5]] * 3 + [[1.0]], (LAYERS, 4, LAYERS))
    calibration.set_tables(True, tables.astype(np.float32))
    return calibration


def sizes_at(found: Survey, calibration: Calibration, row: int, level: int, seen: int) -> np.ndarray:
    """[N, L]: how large the sets of a level are for the surveyed forecasts."""
    logits = torch.from_numpy(found.logits[:, seen]).float()
    rows = torch.full((len(logits),), row + seen, dtype=torch.int32)
    p = calibration(logits, rows).detach().numpy()
    return all_sets(coverage(found, calibration, row), LAYERS)[level].sizes(p, seen)


@given(seed=st.integers(0, 2**32 - 1), level=st.sampled_from(range(len(LEVELS))))
@settings(deadline=None, max_examples=20)
def test_every_layer_at_every_distance_is_covered_and_hardly_more(seed: int, level: int) -> None:
    found, calibration = surveyed(seed), stretching(seed)
    row = calibration.first_row_of(True, hidden_told=False)
    must = int(np.ceil((TOKENS + 1) * LEVELS[level]))
    for seen in range(LAYERS):
        covered = found.needed[:, seen] <= sizes_at(found, calibration, row, level, seen)
        by_first = (found.needed[:, seen] <= K).sum(axis=0)
        for layer in range(seen, LAYERS):
            count = int(covered[:, layer].sum())
            # Thresholds are routed experts' own probabilities; in half precision some are equal.
            assert must <= count <= max(must, by_first[layer]) + 5


def test_sets_are_made_for_a_further_token_of_the_same_kind() -> None:
    found, calibration = surveyed(1), stretching(1)
    row = calibration.first_row_of(True, hidden_told=False)
    sets, fresh = all_sets(coverage(found, calibration, row), LAYERS), surveyed(2, tokens=4000)
    rows = torch.full((4000,), row + 1, dtype=torch.int32)
    p = calibration(torch.from_numpy(fresh.logits[:, 1]).float(), rows).detach().numpy()
    for level, of_level in zip(LEVELS, sets, strict=True):
        covered = (fresh.needed[:, 1] <= of_level.sizes(p, 1))[:, 1:].mean()
        assert covered == pytest.approx(level, abs=0.02)


def test_where_the_first_ranked_are_enough_nobody_else_is_in_a_set() -> None:
    found = surveyed(3)
    sure = Survey(found.logits, found.targets, np.full_like(found.needed, K))
    covering = coverage(sure, Calibration(LAYERS, K), 0)
    assert {n for table in covering.experts for row in table for n in row} == {K}
    assert {p for table in covering.thresholds for row in table for p in row} == {1.0}


@given(st.floats(1e-9, 1.0))
def test_thresholds_are_rounded_down_to_four_digits(threshold: float) -> None:
    rounded = surveying._rounded_down(threshold)
    assert threshold * 0.999 <= rounded <= threshold
    assert float(f"{rounded:.4g}") == rounded
