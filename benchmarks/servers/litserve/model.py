"""predict.onnx behind LitServe: one HTTP process, one worker, its fast queue, uvloop, no access log.

PYTHONPATH=. .venv-servers/litserve/bin/python benchmarks/servers/litserve/model.py PREDICT_ONNX PORT
"""

from __future__ import annotations

import sys

import litserve
import numpy as np
import orjson
from fastapi import Response

from benchmarks.servers.graph import DTYPES, Array, Graph


class Predictor(litserve.LitAPI):
    """Nested lists in and out."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def setup(self, device: str) -> None:
        """Open the graph, in the worker process."""
        self._graph = Graph(self._path)

    def decode_request(self, request):  # an annotation would make FastAPI read the body
        """The body as arrays."""
        return {name: np.array(request[name], dtype) for name, dtype in DTYPES.items()}

    def predict(self, arrays: dict[str, Array]) -> Array:
        """One request."""
        return self._graph(**arrays)

    def encode_response(self, probabilities: Array) -> Response:
        """The answer as it is sent: FastAPI takes longer over a dictionary."""
        body = orjson.dumps({"probabilities": probabilities}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")


if __name__ == "__main__":
    server = litserve.LitServer(
        Predictor(sys.argv[1]), accelerator="cpu", workers_per_device=1, fast_queue=True, timeout=False
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
        loop="uvloop",
        http="httptools",
    )
