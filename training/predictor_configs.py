"""The sizes of the predictors that read windows of past tokens by attention or hidden states, and of the
ensemble."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.config import PrefixConfig, demand


@dataclass(frozen=True)
class InterlayerConfig:
    """The size of the `interlayer` predictor and its larger kinds.

    width: of a token's embedding (channels).
    heads: of an attention layer (count).
    hidden: of a feed-forward layer (channels).
    blocks: attention layers, each with a feed-forward layer (count).
    context: last layers seen of which a token's embedding tells (layers).
    window: tokens looked at, the present one among them (count).
    memory: patterns that can be remembered (count).
    dropout: inside the trunk (0 to 1).
    input_dropout: on routed experts (0 to 1).
    """

    width: int = 256
    heads: int = 8
    hidden: int = 1024
    blocks: int = 4
    context: int = 3
    window: int = 16
    memory: int = 128
    dropout: float = 0.1
    input_dropout: float = 0.1

    def __post_init__(self) -> None:
        _demand_positive(self, "width", "heads", "hidden", "blocks", "context", "memory")
        _demand_attention(self)


@dataclass(frozen=True)
class MultiscaleConfig:
    """The size of the `multiscale` predictor.

    width: of a token's embedding (channels).
    heads: of an attention layer (count).
    hidden: of a feed-forward layer (channels).
    blocks: attention layers of each scale, each with a feed-forward layer (count).
    contexts: of each scale, the last layers seen of which a token's embedding tells, ascending (layers).
    window: tokens looked at, the present one among them (count).
    dropout: inside the trunk (0 to 1).
    input_dropout: on routed experts (0 to 1).
    """

    width: int = 192
    heads: int = 6
    hidden: int = 768
    blocks: int = 2
    contexts: tuple[int, ...] = (2, 3, 4)
    window: int = 16
    dropout: float = 0.1
    input_dropout: float = 0.1

    def __post_init__(self) -> None:
        _demand_positive(self, "width", "heads", "hidden", "blocks")
        ascending = all(a < b for a, b in zip((0, *self.contexts), self.contexts, strict=False))
        demand(
            bool(self.contexts) and ascending, "contexts", self.contexts, "whole numbers from 1, ascending"
        )
        _demand_attention(self)


@dataclass(frozen=True)
class EnsembleConfig:
    """The members of the `ensemble` predictor, and how they are weighted.

    prefix: size of the member of that name (its own knobs).
    interlayer: size of the member of that name (its own knobs).
    multiscale: size of the member of that name (its own knobs).
    sharpness: validation loss by which a member must be behind to count 1/e as much (nats).
    """

    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    interlayer: InterlayerConfig = field(default_factory=InterlayerConfig)
    multiscale: MultiscaleConfig = field(default_factory=MultiscaleConfig)
    sharpness: float = 0.1

    def __post_init__(self) -> None:
        demand(0 < self.sharpness < 100, "sharpness", self.sharpness, "above 0 and below 100")


@dataclass(frozen=True)
class PrefixHiddenConfig:
    """The size of the `prefix-hidden` predictor.

    prefix: size of what reads routing, as the predictor of that name (its own knobs).
    drop_hidden: share of forecasts trained as if no hidden state were known (0 to 1).
    """

    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    drop_hidden: float = 0.2

    def __post_init__(self) -> None:
        _demand_share(self, "drop_hidden")


@dataclass(frozen=True)
class NextGateConfig:
    """The `next-gate` predictor has no size of its own.

    drop_hidden: share of forecasts trained as if no hidden state were known (0 to 1).
    """

    drop_hidden: float = 0.5

    def __post_init__(self) -> None:
        _demand_share(self, "drop_hidden")


@dataclass(frozen=True)
class HiddenLinearConfig:
    """The `hidden-linear` predictor, whose size follows from the model.

    input_dropout: on the hidden state (0 to 1).
    drop_hidden: share of forecasts trained as if no hidden state were known (0 to 1).
    """

    input_dropout: float = 0.1
    drop_hidden: float = 0.1

    def __post_init__(self) -> None:
        _demand_share(self, "input_dropout", "drop_hidden")


@dataclass(frozen=True)
class HiddenMLPConfig:
    """The size of the `hidden-mlp` predictor.

    width: of the trunk (channels).
    hidden: of a residual block (channels).
    blocks: residual blocks (count).
    dropout: inside the trunk (0 to 1).
    input_dropout: on the hidden state (0 to 1).
    drop_hidden: share of forecasts trained as if no hidden state were known (0 to 1).
    """

    width: int = 256
    hidden: int = 512
    blocks: int = 1
    dropout: float = 0.1
    input_dropout: float = 0.1
    drop_hidden: float = 0.1

    def __post_init__(self) -> None:
        _demand_positive(self, "width", "hidden", "blocks")
        _demand_share(self, "dropout", "input_dropout", "drop_hidden")


ProbeConfig = NextGateConfig | HiddenLinearConfig | HiddenMLPConfig
HiddenConfig = PrefixHiddenConfig | ProbeConfig
PredictorConfig = PrefixConfig | InterlayerConfig | MultiscaleConfig | EnsembleConfig | HiddenConfig


def reads_hidden(config: PredictorConfig) -> bool:
    """Whether the predictor of this config reads hidden states."""
    return isinstance(config, HiddenConfig)


def _demand_positive(config: object, *names: str) -> None:
    for name in names:
        demand(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")


def _demand_attention(config: InterlayerConfig | MultiscaleConfig) -> None:
    demand(config.width % config.heads == 0, "width", config.width, f"a multiple of heads ({config.heads})")
    demand(config.window >= 2, "window", config.window, "at least 2")
    _demand_share(config, "dropout", "input_dropout")


def _demand_share(config: object, *names: str) -> None:
    for name in names:
        demand(0 <= getattr(config, name) < 1, name, getattr(config, name), "0 or more and below 1")
