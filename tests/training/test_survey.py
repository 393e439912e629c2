"""How many tokens a survey asks: all where that is cheap, a sample where each costs milliseconds."""

import numpy as np
import pytest

from tests.training.toy_run import PREDICTOR, VALIDATION
from tests.training.toy_zoo import INTERLAYER, untrained
from training import survey as surveying
from training.predictor_configs import PredictorConfig
from training.predictors import examples_of
from training.survey import survey


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
