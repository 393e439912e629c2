"""What of a trained predictor is exported: its functions, and the tensors they pass on.

trained predictor + calibration -> Served -> `training.export`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from model_store.manifest import GraphName, StateTensor


@dataclass(frozen=True)
class Served:
    """Each predictor says what its tensors hold, where it makes this.

    graphs: by file name; predict and advance, or begin and step besides. reads: which tensors of the state
    each takes, in their order; other inputs follow.
    state, token, progress: what a sequence carries from token to token, during a token as begin makes it, and
    from step to step. The last two are empty without begin and step.
    hidden_size: of the hidden states that predict takes as its last input; 0 where it takes none.
    """

    graphs: Mapping[GraphName, nn.Module]
    reads: Mapping[GraphName, tuple[str, ...]]
    state: tuple[StateTensor, ...]
    token: tuple[StateTensor, ...] = ()
    progress: tuple[StateTensor, ...] = ()
    hidden_size: int = 0


def tensor(name: str, dtype: str, *shape: int) -> StateTensor:
    """One of them; `shape` is without the batch axis."""
    return StateTensor.model_validate({"name": name, "dtype": dtype, "shape": shape})
