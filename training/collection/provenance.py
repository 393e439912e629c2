"""All that a recording depends on, as its shards tell it: only a recording with the same is gone on with."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence

from training.collection.config import CollectConfig
from training.collection.model import Loaded
from training.collection.routers import Stack
from training.collection.texts import sha256_of

DIGESTED_WEIGHTS = 1 << 16


def provenance_of(loaded: Loaded, stacks: Sequence[Stack], config: CollectConfig) -> dict[str, str]:
    """Pairs for the footers. Raises TextInvalid where a text cannot be read."""
    files = config.texts if config.prompts is None else (config.prompts,)
    return {
        "source": "specmoe collect",
        "texts": ", ".join(file.name for file in files),
        "texts_sha256": sha256_of(files),
        "kind": "texts" if config.texts else "prompts",
        "domain": config.domain or "",
        "length": str(config.length),
        "new_tokens": str(config.new_tokens),
        "routers": ", ".join(sorted({type(r.module).__name__ for stack in stacks for r in stack.routers})),
        "routers_sha256": _digest(stacks),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "transformers": importlib.metadata.version("transformers"),
    }


def _digest(stacks: Sequence[Stack]) -> str:
    """What tells models apart that have the same name: the first of their routers' weights."""
    digest = hashlib.sha256()
    for stack in stacks:
        for router in stack.routers:
            for parameter in router.module.parameters():
                first = parameter.detach().flatten()[:DIGESTED_WEIGHTS]
                digest.update(first.float().cpu().numpy().tobytes())
    return digest.hexdigest()
