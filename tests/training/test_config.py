"""Knobs out of range are refused by name; every knob says what it is."""

from dataclasses import fields

import pytest

from training.config import PrefixConfig, TrainConfig
from training.errors import ConfigInvalid
from training.predictor_configs import EnsembleConfig, InterlayerConfig, MultiscaleConfig


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, {"passes": 0}, "passes is 0, expected at least 1. Set --passes"),
        (TrainConfig, {"learning_rate": 2.0}, "learning_rate is 2.0, expected between 0 and 1"),
        (TrainConfig, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (TrainConfig, {"drop_gates": 1.0}, "drop_gates is 1.0"),
        (TrainConfig, {"seed": -1}, "seed is -1, expected 0 or more"),
        (
            TrainConfig,
            {"batch_tokens": 100, "block_tokens": 16},
            r"batch_tokens is 100, expected a multiple of block_tokens \(16\)",
        ),
        (PrefixConfig, {"decays": ()}, "decays is "),
        (PrefixConfig, {"decays": (0.0, 1.0)}, "decays is "),
        (PrefixConfig, {"decays": (0.5, 0.9)}, "decays is .*, expected 0, then one or more between 0 and 1"),
        (PrefixConfig, {"layer_decay": 0.0}, "layer_decay is 0.0, expected between 0 and 1"),
        (PrefixConfig, {"dropout": 1.0}, "dropout is 1.0"),
        (PrefixConfig, {"width": 0}, "width is 0"),
        (TrainConfig, {"restarts": -1}, "restarts is -1, expected 0 or more"),
        (TrainConfig, {"permute_experts": 1.5}, "permute_experts is 1.5, expected 0 to 1"),
        (TrainConfig, {"mixup": -0.1}, "mixup is -0.1"),
        (TrainConfig, {"noise": 2.0}, "noise is 2.0"),
        (TrainConfig, {"drop_layers": 1.0}, "drop_layers is 1.0"),
        (InterlayerConfig, {"memory": 0}, "memory is 0, expected at least 1"),
        (InterlayerConfig, {"width": 100, "heads": 8}, r"width is 100, expected a multiple of heads \(8\)"),
        (InterlayerConfig, {"window": 1}, "window is 1, expected at least 2"),
        (MultiscaleConfig, {"contexts": ()}, "contexts is "),
        (MultiscaleConfig, {"contexts": (3, 2)}, "contexts is .*, expected whole numbers from 1, ascending"),
        (EnsembleConfig, {"sharpness": 0.0}, "sharpness is 0.0, expected above 0"),
    ],
)
def test_a_value_out_of_range_is_refused(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        kind(**values)


KINDS = (TrainConfig, PrefixConfig, InterlayerConfig, MultiscaleConfig, EnsembleConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_every_knob_is_documented_with_its_unit(kind: type) -> None:
    lines = dict(line.strip().split(": ", 1) for line in (kind.__doc__ or "").splitlines() if ": " in line)
    assert set(lines) == {field.name for field in fields(kind)}
    assert all(line.endswith(").") for line in lines.values())
