"""Ask a specMoE service, from inside a decode loop, which experts the coming layers will need.

with Client(timeout_ms=5) as client:
    prediction = client.predict("gpt-oss-20b", Sequence(experts=seen, token_id=976), top_n=8)
    if prediction is not None:
        fetch(prediction.sequences[0].layers, prediction.sequences[0].experts)

`Stream` does the same while the token runs, layer by layer, without questions and answers.
"""

from specmoe_client.async_client import AsyncClient
from specmoe_client.async_stream import AsyncStream
from specmoe_client.client import Client
from specmoe_client.errors import (
    AnswerInvalid,
    AnswerLate,
    ClientError,
    MessageRefused,
    NoPrediction,
    NotFound,
    RequestInvalid,
    RequestRefused,
    ServiceUnavailable,
    ServiceUnreachable,
)
from specmoe_client.predictions import (
    LayerRanking,
    ModelInfo,
    Prediction,
    RoutingShape,
    SequencePrediction,
    UnionPrediction,
)
from specmoe_client.questions import Options, Sequence, Token
from specmoe_client.stream import Stream
from specmoe_client.streaming.conversation import StreamStatus
from specmoe_client.streaming.forecasts import SequenceForecast, UnionForecast

__all__ = [
    "AnswerInvalid",
    "AnswerLate",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "ClientError",
    "LayerRanking",
    "MessageRefused",
    "ModelInfo",
    "NoPrediction",
    "NotFound",
    "Options",
    "Prediction",
    "RequestInvalid",
    "RequestRefused",
    "RoutingShape",
    "Sequence",
    "SequenceForecast",
    "SequencePrediction",
    "ServiceUnavailable",
    "ServiceUnreachable",
    "Stream",
    "StreamStatus",
    "Token",
    "UnionForecast",
    "UnionPrediction",
]
