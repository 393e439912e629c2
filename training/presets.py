"""What can be trained by name: a predictor's size, and how it is trained unless told otherwise.

specmoe train --predictor NAME
"""

from __future__ import annotations

from dataclasses import dataclass

from training.config import PrefixConfig, TrainConfig
from training.predictor_configs import (
    EnsembleConfig,
    HiddenLinearConfig,
    HiddenMLPConfig,
    InterlayerConfig,
    MultiscaleConfig,
    NextGateConfig,
    PredictorConfig,
    PrefixHiddenConfig,
)

DEFAULT = "prefix"


@dataclass(frozen=True)
class Preset:
    """config: the size; its type says which predictor it is (`training.predictors`). train: the defaults."""

    config: PredictorConfig
    train: TrainConfig


# All tokens of a window are trained at once, and attention takes smaller steps than sums do.
ATTENTION = TrainConfig(block_tokens=16, learning_rate=1e-3)

PRESETS = {
    DEFAULT: Preset(PrefixConfig(), TrainConfig(near=10.0)),
    "interlayer": Preset(InterlayerConfig(), ATTENTION),
    "interlayer-extended": Preset(
        InterlayerConfig(width=320, heads=10, hidden=1280, blocks=5),
        TrainConfig(block_tokens=16, learning_rate=7e-4),
    ),
    "interlayer-enhanced": Preset(
        InterlayerConfig(width=512, heads=16, hidden=2048, blocks=6),
        TrainConfig(block_tokens=16, learning_rate=5e-4, restarts=2),
    ),
    "multiscale": Preset(MultiscaleConfig(), ATTENTION),
    "ensemble": Preset(EnsembleConfig(), ATTENTION),
    # Of the first, what is usual is trained and nothing else.
    "next-gate": Preset(NextGateConfig(), TrainConfig(passes=2)),
    "hidden-linear": Preset(HiddenLinearConfig(), TrainConfig(near=1.0)),
    "hidden-mlp": Preset(HiddenMLPConfig(), TrainConfig(near=1.0)),
    "prefix-hidden": Preset(PrefixHiddenConfig(), TrainConfig(near=1.0)),
}
