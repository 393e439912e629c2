"""Made-up routing to measure with: valid for a model's spec, the same in every run.

RoutingSpec -> inputs of the graphs, or the body of a request

specmoe bench --quick
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from traces.spec import RoutingSpec

# In every vocabulary, so that a predictor looks up the token as it would a real one.
TOKEN_IDS = 1000


@dataclass(frozen=True)
class Routing:
    """The current token of B sequences, some of its layers seen: what `Speculator.predict` takes."""

    token_ids: Int64[np.ndarray, "B"]
    experts: Int32[np.ndarray, "B L K"]
    gates: Float32[np.ndarray, "B L K"]


def made_up(spec: RoutingSpec, *, batch: int, seen: int, seed: int) -> Routing:
    """Any experts, each at most once a layer, with gates that fall from slot to slot as a router's do."""
    rng = np.random.default_rng(seed)
    shape = (batch, spec.num_layers)
    experts = np.argsort(rng.random((*shape, spec.num_experts)), axis=-1)[..., : spec.top_k].astype(np.int32)
    experts[:, seen:] = -1
    gates = -np.sort(-rng.dirichlet(np.ones(spec.top_k), shape), axis=-1)
    # Four decimals, as a server would write them into JSON; none of them 0.
    gates = np.maximum(np.round(gates, 4), 1e-4).astype(np.float32)
    return Routing(rng.integers(0, TOKEN_IDS, batch), experts, gates)


def request_body(model: str, version: int, routing: Routing, *, seen: int) -> dict[str, Any]:
    """The first sequence of it as the body of POST /v1/predict: no context, every layer left is wanted."""
    gates = np.round(routing.gates[0, :seen].astype(np.float64), 4)
    return {
        "model": model,
        "version": version,
        "sequences": [
            {
                "token_id": int(routing.token_ids[0]),
                "experts": routing.experts[0, :seen].tolist(),
                "gates": gates.tolist(),
            }
        ],
    }
