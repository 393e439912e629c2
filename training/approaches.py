"""What `specmoe compare` compares: every predictor, augmentation, plain baseline and control, by name.

Beside `presets`, which it takes predictors from; `compare` trains and scores what is listed here.

    specmoe compare --traces train.npz --validation validation.npz --test test.npz --folder comparison
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.baselines import BASELINES
from training.config import PrefixConfig, TrainConfig
from training.errors import ConfigInvalid
from training.predictor_configs import (
    EnsembleConfig,
    HiddenLinearConfig,
    HiddenMLPConfig,
    InterlayerConfig,
    MultiscaleConfig,
    NextGateConfig,
    PredictorConfig,
    PrefixHiddenConfig,
    reads_hidden,
)
from training.presets import DEFAULT, PRESETS

# Strengths to begin with, not tuned: a small share of each.
AUGMENTATIONS: dict[str, dict[str, float]] = {
    "permute-experts": {"permute_experts": 0.2},
    "drop-layers": {"drop_layers": 0.1},
    "mixup": {"mixup": 0.2},
    "noise": {"noise": 0.1},
}
ALL_AUGMENTATIONS = {knob: value for knobs in AUGMENTATIONS.values() for knob, value in knobs.items()}
CONTROL = "control-shuffled"
ORACLE = "oracle"

# Sizes of `--quick`: enough to run every line, too small to learn.
QUICK_PREFIX = PrefixConfig(width=16, hidden=32, decays=(0.0, 0.8), window=24, earlier_width=8, token_width=4)
QUICK_INTERLAYER = InterlayerConfig(width=16, heads=2, hidden=32, blocks=1, window=8, memory=4)
QUICK_MULTISCALE = MultiscaleConfig(width=16, heads=2, hidden=32, blocks=1, contexts=(1, 4), window=8)
QUICK_SIZES: dict[str, PredictorConfig] = {
    "prefix": QUICK_PREFIX,
    "interlayer": QUICK_INTERLAYER,
    "interlayer-extended": replace(QUICK_INTERLAYER, width=24, heads=3),
    "interlayer-enhanced": replace(QUICK_INTERLAYER, width=32, heads=4),
    "multiscale": QUICK_MULTISCALE,
    "ensemble": EnsembleConfig(QUICK_PREFIX, QUICK_INTERLAYER, QUICK_MULTISCALE),
    "next-gate": NextGateConfig(),
    "hidden-linear": HiddenLinearConfig(),
    "hidden-mlp": HiddenMLPConfig(width=16, hidden=32),
    "prefix-hidden": PrefixHiddenConfig(QUICK_PREFIX),
}
QUICK_BATCH, QUICK_BLOCK = 64, 8


@dataclass(frozen=True)
class Approach:
    """One row of the comparison.

    name: as on the command line, in file names and in the report.
    predictor: name of the preset that is trained; "" for a plain baseline.
    baseline: name among the plain baselines; "" for what is trained.
    augmentation: knobs of `TrainConfig` that differ from the preset's.
    shuffled: trained on routing that is shuffled between tokens.
    """

    name: str
    predictor: str = ""
    baseline: str = ""
    augmentation: tuple[tuple[str, float], ...] = ()
    shuffled: bool = False

    @property
    def reads_hidden(self) -> bool:
        """Whether it can be trained on traces with hidden states only."""
        return bool(self.predictor) and reads_hidden(PRESETS[self.predictor].config)

    def config(self, quick: bool) -> PredictorConfig:
        """The size of the predictor."""
        return QUICK_SIZES[self.predictor] if quick else PRESETS[self.predictor].config

    def training(self, seed: int, *, passes: int | None, precision: str | None, quick: bool) -> TrainConfig:
        """How it is trained. passes, precision: instead of the preset's."""
        changes: dict[str, Any] = dict(self.augmentation)
        if precision is not None:
            changes["precision"] = precision
        usual = replace(PRESETS[self.predictor].train, seed=seed, **changes)
        if quick:
            usual = replace(
                usual,
                passes=1,
                batch_tokens=QUICK_BATCH,
                block_tokens=QUICK_BLOCK,
                warmup_steps=4,
                averaging=0.5,
            )
        return usual if passes is None else replace(usual, passes=passes)


def _listed() -> list[Approach]:
    augmented = [
        Approach(f"{DEFAULT}+{name}", DEFAULT, augmentation=tuple(knobs.items()))
        for name, knobs in AUGMENTATIONS.items()
    ]
    return [
        *(Approach(name.replace(" ", "-"), baseline=name) for name in BASELINES),
        *(Approach(name, name) for name in PRESETS),
        *augmented,
        Approach("ensemble+augmentation", "ensemble", augmentation=tuple(ALL_AUGMENTATIONS.items())),
        Approach(CONTROL, DEFAULT, shuffled=True),
    ]


APPROACHES = {approach.name: approach for approach in _listed()}


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigInvalid for a name that is none of an approach."""
    for name in names:
        if name not in APPROACHES:
            raise ConfigInvalid(
                f"{name!r} is no approach, expected some of {', '.join(APPROACHES)}.",
                remedy="Give these names to --predictors, or leave it out for all.",
            )


def chosen(names: Sequence[str], *, hidden: bool) -> list[Approach]:
    """The approaches of these names, in the order of the list. Raises ConfigInvalid.

    Without names all of them, but for those that read hidden states where there are none (`hidden`).
    """
    check_names(names)
    if names:
        return [approach for name, approach in APPROACHES.items() if name in names]
    return [approach for approach in APPROACHES.values() if hidden or not approach.reads_hidden]
