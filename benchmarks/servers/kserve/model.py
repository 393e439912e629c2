"""predict.onnx behind KServe's Python SDK: one worker, uvloop, no gRPC, no latency log, no access log.

PYTHONPATH=. .venv-servers/kserve/bin/python benchmarks/servers/kserve/model.py PREDICT_ONNX PORT
"""

from __future__ import annotations

import asyncio
import logging
import sys

from benchmarks.servers.graph import Graph

# The SDK reads the command line when it is imported.
graph, port = sys.argv.pop(1), int(sys.argv.pop(1))

import uvloop  # noqa: E402
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer  # noqa: E402


class Predictor(Model):
    """Open Inference Protocol in and out."""

    def __init__(self) -> None:
        super().__init__("model")
        self._graph = Graph(graph)
        self.ready = True

    async def predict(self, payload: InferRequest, *_: object, **__: object) -> InferResponse:
        """One request."""
        arrays = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        probabilities = self._graph(**arrays)
        # Its own set_data_from_numpy takes twice as long.
        data = probabilities.ravel().tolist()
        output = InferOutput("probabilities", list(probabilities.shape), "FP32", data)
        return InferResponse(payload.id or "", "model", [output])


if __name__ == "__main__":
    # Its own event_loop="uvloop" is for several workers; a single one runs on asyncio's.
    uvloop.install()
    # It looks for a loop before it makes its own, which uvloop's policy, unlike asyncio's, does not make up.
    asyncio.set_event_loop(asyncio.new_event_loop())
    server = ModelServer(http_port=port, enable_grpc=False, enable_latency_logging=False, workers=1)
    # The SDK has no switch for these, and writes a line of each for every request.
    for name in ("uvicorn.access", "kserve.trace"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).disabled = True
    server.start([Predictor()])
