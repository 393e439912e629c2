"""Ask a specMoE service, from inside a decode loop, which experts the coming layers will need.

with Client(timeout_ms=5) as client:
    prediction = client.predict("gpt-oss-20b", Sequence(experts=seen, token_id=976), top_n=8)
    if prediction is not None:
        fetch(prediction.sequences[0].layers, prediction.sequences[0].experts)
"""

from specmoe_client.async_client import AsyncClient
from specmoe_client.client import Client
from specmoe_client.errors import (
    AnswerInvalid,
    AnswerLate,
    ClientError,
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

__all__ = [
    "AnswerInvalid",
    "AnswerLate",
    "AsyncClient",
    "Client",
    "ClientError",
    "LayerRanking",
    "ModelInfo",
    "NoPrediction",
    "NotFound",
    "Options",
    "Prediction",
    "RequestInvalid",
    "RequestRefused",
    "RoutingShape",
    "Sequence",
    "SequencePrediction",
    "ServiceUnavailable",
    "ServiceUnreachable",
    "Token",
    "UnionPrediction",
]
