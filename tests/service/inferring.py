"""Requests of the Open Inference Protocol as its clients write them: JSON, and bytes behind it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.toy_version import TOY_SPEC

PATH = "/v2/models/toy/infer"
HEADER = "Inference-Header-Content-Length"
LAYERS, EXPERTS, TOP_K = TOY_SPEC.num_layers, TOY_SPEC.num_experts, TOY_SPEC.top_k
DATATYPES = {"float16": "FP16", "float32": "FP32", "int32": "INT32", "int64": "INT64", "uint8": "UINT8"}


def made_up(batch: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Every input of the toy's predict, as if its sequences had a past; two layers of the tokens are seen."""
    random = np.random.default_rng(seed)
    experts = np.full((batch, LAYERS, TOP_K), -1, np.int32)
    for row in experts:
        row[:2] = [random.choice(EXPERTS, TOP_K, replace=False) for _ in range(2)]
    return {
        "token_id": random.integers(0, 1000, batch),
        "experts": experts,
        "gates": random.uniform(0.1, 1, experts.shape).astype(np.float32),
        "average": random.uniform(0, 1, (batch, LAYERS, EXPERTS)).astype(np.float32),
        "last_token": random.integers(0, 1000, (batch, 1)).astype(np.int32),
    }


def as_json(name: str, array: np.ndarray, **changed: Any) -> dict[str, Any]:
    """An input whose numbers stand in the JSON."""
    described = {"name": name, "shape": list(array.shape), "datatype": DATATYPES[array.dtype.name]}
    return described | {"data": array.ravel().tolist()} | changed


def as_bytes(name: str, array: np.ndarray, **changed: Any) -> dict[str, Any]:
    """An input whose bytes come behind the JSON."""
    described = {"name": name, "shape": list(array.shape), "datatype": DATATYPES[array.dtype.name]}
    return described | {"parameters": {"binary_data_size": array.nbytes}} | changed


def binary_body(arrays: dict[str, np.ndarray], **fields: Any) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of a request with all its inputs in bytes."""
    inputs = [as_bytes(name, array) for name, array in arrays.items()]
    text = json.dumps({"inputs": inputs, **fields}).encode()
    return text + b"".join(array.tobytes() for array in arrays.values()), {HEADER: str(len(text))}
