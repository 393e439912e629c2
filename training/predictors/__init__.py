"""The predictors that can be trained: torch modules, the examples they read, and what of them is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.calibration import Calibration
from training.config import PrefixConfig
from training.dataset import Blocks
from training.examples import Examples
from training.predictor_configs import (
    EnsembleConfig,
    InterlayerConfig,
    MultiscaleConfig,
    PredictorConfig,
)
from training.predictors import ensemble_graphs, prefix_graphs, window_graphs
from training.predictors.ensemble import EnsemblePredictor, Joint
from training.predictors.interlayer import InterlayerPredictor
from training.predictors.multiscale import MultiscalePredictor
from training.predictors.predictor import Predictor
from training.predictors.prefix import PrefixPredictor
from training.served import Served
from training.vocabulary import Vocabulary
from training.windows import Windows


@dataclass(frozen=True)
class Kind:
    """network: makes it, from spec, config and vocabulary. examples: makes them, from a trace, the tokens of
    a block, and the config. served: takes a trained one, with its calibration, apart."""

    network: Callable[[RoutingSpec, Any, Vocabulary], Predictor]
    examples: type[Examples[Any]]
    served: Callable[[Any, Calibration], Served]


KINDS: dict[type[PredictorConfig], Kind] = {
    PrefixConfig: Kind(PrefixPredictor, Blocks, prefix_graphs.served),
    InterlayerConfig: Kind(InterlayerPredictor, Windows, window_graphs.served),
    MultiscaleConfig: Kind(MultiscalePredictor, Windows, window_graphs.served),
    EnsembleConfig: Kind(EnsemblePredictor, Joint, ensemble_graphs.served),
}


def kind_of(config: PredictorConfig) -> Kind:
    """The kind of predictor that a config is the size of."""
    return KINDS[type(config)]


def examples_of(trace: RoutingTrace, block_tokens: int, config: PredictorConfig) -> Examples[Any]:
    """The examples of a trace, as the predictor of this config reads them."""
    make: Callable[[RoutingTrace, int, PredictorConfig], Examples[Any]] = kind_of(config).examples
    return make(trace, block_tokens, config)
