"""predict.onnx behind BentoML: one worker, uvloop, no metrics, no access log.

PYTHONPATH=. .venv-servers/bentoml/bin/python benchmarks/servers/bentoml/model.py PREDICT_ONNX PORT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
import orjson
from bentoml.validators import ContentType
from pydantic import BaseModel

from benchmarks.servers.graph import DTYPES, Graph

GRAPH = "PREDICT_ONNX"


class Row(BaseModel):
    """One sequence: BentoML makes batches of lists of something, of one argument only."""

    token_id: int
    experts: list[list[int]]
    gates: list[list[float]]


@bentoml.service(
    workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}}, traffic={"timeout": 60}
)
class Predictor:
    """Nested lists in and out. Coroutines, since a plain method is sent to a thread."""

    def __init__(self) -> None:
        self._graph = Graph(os.environ[GRAPH])

    @bentoml.api
    async def predict(
        self, token_id: np.ndarray, experts: np.ndarray, gates: np.ndarray
    ) -> Annotated[str, ContentType("application/json")]:
        """One request. Its JSON is made here: over an array BentoML takes twice as long."""
        arrays = zip((token_id, experts, gates), DTYPES.values(), strict=True)
        probabilities = self._graph(*(array.astype(dtype) for array, dtype in arrays))
        return orjson.dumps(probabilities, option=orjson.OPT_SERIALIZE_NUMPY).decode()

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=60_000)
    async def predict_batched(self, rows: list[Row]) -> list[list[list[float]]]:
        """Requests that came at the same time, by BentoML's adaptive batching."""
        columns = {name: [getattr(row, name) for row in rows] for name in DTYPES}
        arrays = {name: np.array(columns[name], dtype) for name, dtype in DTYPES.items()}
        return self._graph(**arrays).tolist()


if __name__ == "__main__":
    program = str(Path(sys.executable).with_name("bentoml"))
    address = ["--host", "127.0.0.1", "--port", sys.argv[2]]
    os.execve(  # noqa: S606  # without a shell, as it should be
        program,
        [program, "serve", "benchmarks.servers.bentoml.model:Predictor", *address],
        os.environ | {GRAPH: sys.argv[1], "BENTOML_DO_NOT_TRACK": "true"},
    )
