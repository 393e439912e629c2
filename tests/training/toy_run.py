"""A small training run on made-up routing, for tests: seconds, not minutes."""

from pathlib import Path

import numpy as np
import torch

from tests.training.toy_routing import toy_trace
from traces.trace import RoutingTrace
from training.config import PrefixConfig, TrainConfig
from training.dataset import Blocks
from training.loop import Trainer
from training.predictors.prefix import PrefixPredictor
from training.processes import Processes
from training.vocabulary import Vocabulary

PREDICTOR = PrefixConfig(
    width=16, hidden=32, blocks=1, decays=(0.0, 0.8), window=24, earlier_width=8, token_width=4
)
TRAIN = toy_trace((60, 40, 30), seed=1)
VALIDATION = toy_trace((30, 20), seed=2)


def save_npz(trace: RoutingTrace, path: Path) -> Path:
    """Write a trace as the neutral .npz."""
    arrays = {
        "experts": trace.experts.astype(np.uint8),
        "starts": trace.starts,
        "domains": np.array(trace.domains),
    }
    if trace.gates is not None:
        arrays["gates"] = trace.gates.astype(np.float16)
    if trace.token_ids is not None:
        arrays["token_ids"] = trace.token_ids
    np.savez(path, num_experts=trace.spec.num_experts, model=trace.spec.model, **arrays)
    return path


ALONE = Processes(0, 1, torch.device("cpu"))


def toy_trainer(
    folder: Path, config: TrainConfig, predictor: PrefixConfig = PREDICTOR, where: Processes = ALONE
) -> Trainer:
    """A trainer at its first step, seeded."""
    torch.manual_seed(config.seed)
    network = PrefixPredictor(TRAIN.spec, predictor, Vocabulary.of(TRAIN.token_ids, TRAIN.starts))
    blocks = [Blocks(trace, config.block_tokens, predictor) for trace in (TRAIN, VALIDATION)]
    return Trainer(network, blocks[0], blocks[1], config, folder, where)
