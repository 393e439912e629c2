"""Every predictor that can be trained by name, in a size that trains in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from model_store.store import open_store
from speculation.runtime import Speculator
from tests.training.toy_hidden import save_shards, with_hidden
from tests.training.toy_routing import toy_trace
from tests.training.toy_run import PREDICTOR, save_npz
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.config import TrainConfig
from training.pipeline import train
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
from training.predictors import network_of
from training.predictors.predictor import Predictor
from training.vocabulary import Vocabulary

TOP_ONE = RoutingSpec(model="toy", num_layers=4, num_experts=8, top_k=1)
INTERLAYER = InterlayerConfig(width=16, heads=2, hidden=32, blocks=1, context=3, window=8, memory=4)
MULTISCALE = MultiscaleConfig(width=16, heads=2, hidden=32, blocks=1, contexts=(2, 3, 4), window=8)
# Exporting takes as long as there are operators.
ENSEMBLE = EnsembleConfig(PREDICTOR, INTERLAYER, replace(MULTISCALE, contexts=(1, 4)))
SMALL: dict[str, PredictorConfig] = {
    "prefix": PREDICTOR,
    "interlayer": INTERLAYER,
    "interlayer-extended": InterlayerConfig(width=24, heads=3, hidden=32, blocks=1, window=8, memory=4),
    "interlayer-enhanced": InterlayerConfig(width=32, heads=4, hidden=32, blocks=1, window=8, memory=4),
    "multiscale": MULTISCALE,
    "ensemble": ENSEMBLE,
    "next-gate": NextGateConfig(),
    "hidden-linear": HiddenLinearConfig(input_dropout=0.0),
    "hidden-mlp": HiddenMLPConfig(width=16, hidden=32),
    "prefix-hidden": PrefixHiddenConfig(PREDICTOR),
}
TRAINING = TrainConfig(
    passes=6, batch_tokens=32, block_tokens=8, learning_rate=0.01, warmup_steps=4, averaging=0.5
)


def untrained(config: PredictorConfig, trace: RoutingTrace) -> Predictor:
    """A predictor for this trace with every part of it at work: nothing of it is 0."""
    torch.manual_seed(3)
    vocabulary = Vocabulary.of(trace.token_ids, trace.starts)
    hidden_size = trace.hidden.size if trace.hidden else 0
    network = network_of(trace.spec, config, vocabulary, hidden_size).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("tokens.weight"):
                parameter[0] = 0.0  # no token id
    return network


def published(
    name: str, config: PredictorConfig, folder: Path, spec: RoutingSpec, how: TrainConfig = TRAINING
) -> Speculator:
    """Train on a made-up trace, export, publish into `folder`, load and run."""
    files = []
    for use, lengths, seed in (("train", (60, 40, 30), 1), ("validation", (30, 20), 2)):
        trace = toy_trace(lengths, seed=seed, spec=spec)
        if reads_hidden(config):
            files.append(save_shards(with_hidden(trace), folder / use))
        else:
            files.append(save_npz(trace, folder / f"{use}.npz"))
    train(
        traces=(files[0],),
        validation=(files[1],),
        folder=folder / "run",
        model=None,
        train_config=how,
        predictor=name,
        predictor_config=config,
        command="specmoe train",
        store=str(folder / "store"),
    )
    return Speculator(open_store(folder / "store").load(spec.model, 1), provider="cpu")
