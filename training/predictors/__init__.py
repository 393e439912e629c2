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
from training.hidden_states import HiddenExamples, PrefixHiddenExamples
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
from training.predictors import ensemble_graphs, prefix_graphs, prefix_hidden, probe_graphs, window_graphs
from training.predictors.ensemble import EnsemblePredictor, Joint
from training.predictors.interlayer import InterlayerPredictor
from training.predictors.multiscale import MultiscalePredictor
from training.predictors.predictor import Predictor
from training.predictors.prefix import PrefixPredictor
from training.predictors.prefix_hidden import PrefixHiddenPredictor
from training.predictors.probes import HiddenLinear, HiddenMLP, NextGate
from training.served import Served
from training.vocabulary import Vocabulary
from training.windows import Windows


@dataclass(frozen=True)
class Kind:
    """network: makes it, from spec, config and vocabulary; if it reads hidden states, from their size
    besides.
    examples: makes them, from a trace, the tokens of a block, and the config. served: takes a trained one,
    with its calibration, apart."""

    network: Callable[..., Predictor]
    examples: type[Examples[Any]]
    served: Callable[[Any, Calibration], Served]


KINDS: dict[type[PredictorConfig], Kind] = {
    PrefixConfig: Kind(PrefixPredictor, Blocks, prefix_graphs.served),
    InterlayerConfig: Kind(InterlayerPredictor, Windows, window_graphs.served),
    MultiscaleConfig: Kind(MultiscalePredictor, Windows, window_graphs.served),
    EnsembleConfig: Kind(EnsemblePredictor, Joint, ensemble_graphs.served),
    NextGateConfig: Kind(NextGate, HiddenExamples, probe_graphs.served),
    HiddenLinearConfig: Kind(HiddenLinear, HiddenExamples, probe_graphs.served),
    HiddenMLPConfig: Kind(HiddenMLP, HiddenExamples, probe_graphs.served),
    PrefixHiddenConfig: Kind(PrefixHiddenPredictor, PrefixHiddenExamples, prefix_hidden.served),
}


def kind_of(config: PredictorConfig) -> Kind:
    """The kind of predictor that a config is the size of."""
    return KINDS[type(config)]


def network_of(
    spec: RoutingSpec, config: PredictorConfig, vocabulary: Vocabulary, hidden_size: int = 0
) -> Predictor:
    """An untrained predictor of this size. hidden_size: of the traces' hidden states, 0 where they have
    none."""
    further = (hidden_size,) if reads_hidden(config) else ()
    return kind_of(config).network(spec, config, vocabulary, *further)


def examples_of(trace: RoutingTrace, block_tokens: int, config: PredictorConfig) -> Examples[Any]:
    """The examples of a trace, as the predictor of this config reads them."""
    make: Callable[[RoutingTrace, int, PredictorConfig], Examples[Any]] = kind_of(config).examples
    return make(trace, block_tokens, config)
