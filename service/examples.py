"""Requests that the documentation shows, for the model that ships. A test posts every one of them.

curl localhost:8080/openapi.json
"""

from __future__ import annotations

from typing import Any

MODEL = "gpt-oss-20b"
_SEEN = [[3, 17, 8, 30], [12, 5, 9, 1]]
_GATES = [[0.41, 0.27, 0.19, 0.13], [0.52, 0.2, 0.16, 0.12]]
# Two layers seen of 24, the others not yet.
_SO_FAR = [[*_SEEN, *[[-1] * 4] * 22]]
_FINISHED = {"token_id": 200, "experts": [[layer, layer + 2, layer + 5, layer + 8] for layer in range(24)]}

PREDICT: dict[str, dict[str, Any]] = {
    "token_start": {
        "summary": "One sequence, before the first layer of a token",
        "value": {"model": MODEL, "sequences": [{"token_id": 976}]},
    },
    "two_layers_seen": {
        "summary": "Two layers later, with a finished token of context",
        "value": {
            "model": MODEL,
            "sequences": [{"token_id": 976, "experts": _SEEN, "gates": _GATES, "context": [_FINISHED]}],
            "layers": [2, 3, 4],
            "top_n": 8,
        },
    },
    "coverage": {
        "summary": "As many experts as it takes for all routed ones to be among them with 95 %",
        "value": {"model": MODEL, "sequences": [{"experts": _SEEN}], "layers": [2], "coverage": 0.95},
    },
    "union": {
        "summary": "What two sequences at different depths will need together",
        "value": {
            "model": MODEL,
            "version": "production",
            "sequences": [{"token_id": 976, "experts": _SEEN}, {"token_id": 13}],
            "top_n": 16,
            "combine": "union",
        },
    },
}

INFER: dict[str, dict[str, Any]] = {
    "two_layers_seen": {
        "summary": "One sequence that begins, two layers of its first token seen",
        "value": {
            "id": "step-17",
            "inputs": [
                {"name": "token_id", "shape": [1], "datatype": "INT64", "data": [976]},
                {"name": "experts", "shape": [1, 24, 4], "datatype": "INT32", "data": _SO_FAR},
            ],
            "outputs": [{"name": "probabilities"}],
        },
    },
}
