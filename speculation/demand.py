"""What a batch needs together: sequences decoded in one step share the experts that are fetched.

experts, probabilities = rank(union_demand(speculator.predict(...)), n=16)
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def union_demand(probabilities: Float[np.ndarray, "B L E"]) -> Float[np.ndarray, "L E"]:
    """Probability that one of B independent sequences, or more, needs an expert: 1 - prod(1 - p)."""
    demand: Float[np.ndarray, "L E"] = 1.0 - np.prod(1.0 - probabilities, axis=0)
    return demand
