"""`predict.onnx` as every other server runs it: one call, opened as the service opens it.

Nothing here is a server's: what they differ in is what they put around this. The state of a sequence is not
sent but stands here as zeros, so that their requests are as small as they can be.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from speculation.session import open_session

Array = np.ndarray[Any, Any]
DTYPES = {"token_id": np.int64, "experts": np.int32, "gates": np.float32}
ZEROS_OF = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


class Graph:
    """The probabilities of all layers for `token_id[B]`, `experts[B, L, K]` and `gates[B, L, K]`."""

    def __init__(self, path: str) -> None:
        self._session = open_session(Path(path).read_bytes(), path, "cpu", threads=1)
        self._zeros = functools.cache(self._made_zeros)
        self._options = onnxruntime.RunOptions()

    def __call__(self, token_id: Array, experts: Array, gates: Array) -> Array:
        feed = {"token_id": token_id, "experts": experts, "gates": gates, **self._zeros(len(experts))}
        probabilities: Array = self._session.run(["probabilities"], feed, self._options)[0]
        return probabilities

    def _made_zeros(self, batch: int) -> dict[str, Array]:
        """The state of sequences of which nothing has happened: every input that a request does not bring."""
        state = [tensor for tensor in self._session.get_inputs() if tensor.name not in DTYPES]
        return {t.name: np.zeros((batch, *t.shape[1:]), ZEROS_OF[t.type]) for t in state}
