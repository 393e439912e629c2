"""predict.onnx behind MLServer: no worker processes, uvloop, no metrics, no access log.

PYTHONPATH=. .venv-servers/mlserver/bin/python benchmarks/servers/mlserver/model.py PREDICT_ONNX PORT
"""

from __future__ import annotations

import asyncio
import sys

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import install_uvloop_event_loop

from benchmarks.servers.graph import Graph


class Predictor(MLModel):
    """Open Inference Protocol in and out."""

    async def load(self) -> bool:
        """Open the graph."""
        self._graph = Graph(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One request."""
        arrays = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        outputs = [NumpyCodec.encode_output("probabilities", self._graph(**arrays))]
        return InferenceResponse(model_name=self.name, outputs=outputs)


async def serve(graph: str, port: int) -> None:
    """Until SIGTERM."""
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=port,
        grpc_port=0,
        parallel_workers=0,
        metrics_endpoint=None,
        gzip_enabled=False,
    )
    model = ModelSettings(name="model", implementation=Predictor, parameters={"uri": graph})
    await MLServer(settings).start([model])


if __name__ == "__main__":
    install_uvloop_event_loop()
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
