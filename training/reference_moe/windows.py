"""Windows of token ids to train and to score on.

Between `texts` and `loop`. What a step draws follows from seed and step: a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Int64, UInt16
from torch import Tensor

from training.errors import TextInvalid
from training.reference_moe.config import ReferenceConfig

Ids = Mapping[str, UInt16[np.ndarray, "T"]]


def check_length(ids: Ids, config: ReferenceConfig, split: str) -> None:
    """Raise TextInvalid where a domain is shorter than a window."""
    for domain, of in ids.items():
        if len(of) <= config.context:
            raise TextInvalid(
                f"Domain {domain} has {len(of)} tokens in {split}, expected {config.context + 1} at least.",
                remedy="Give it more text, leave it out, or train with a smaller --context.",
            )


def draw(ids: Ids, config: ReferenceConfig, step: int) -> Int64[Tensor, "B T"]:
    """The windows of a step, from places drawn at random, of domains that take turns."""
    random = np.random.default_rng((config.seed, step))
    domains = list(ids)
    size = config.context + 1
    first = int(random.integers(len(domains)))
    windows = []
    for row in range(config.batch_size):
        of = ids[domains[(first + row) % len(domains)]]
        start = int(random.integers(len(of) - size + 1))
        windows.append(of[start : start + size])
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def in_order(of: UInt16[np.ndarray, "T"], context: int, tokens: int) -> Int64[Tensor, "N T"]:
    """Windows that follow each other and share a token, which the one ends with and the next begins with."""
    count = max(1, min(tokens, len(of) - 1) // context)
    starts = np.arange(count)[:, None] * context
    return torch.from_numpy(of[starts + np.arange(context + 1)].astype(np.int64))
