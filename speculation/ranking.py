"""From probabilities to the experts to fetch, best first.

experts, probabilities = rank(speculator.predict(...), n=8)
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int32

from speculation.errors import InputInvalid
from traces.spec import MAX_EXPERTS

# An expert's id fits into so many bits of a sorting key.
ID_BITS = (MAX_EXPERTS - 1).bit_length()
ID_MASK = (1 << ID_BITS) - 1
_IDS = np.arange(MAX_EXPERTS)
# Below this share of the experts, selecting before sorting is faster than sorting all.
SELECT_BELOW = 1 / 8


def rank(
    probabilities: Float[np.ndarray, "... E"], n: int
) -> tuple[Int32[np.ndarray, "... n"], Float32[np.ndarray, "... n"]]:
    """The n likeliest experts of each row, best first, and their probabilities. Ties: the lower id first.

    Sorts one integer an expert instead of an index: the bits of a float from 0 are ordered as the float is,
    and the id below them breaks ties. Two to ten times faster than a stable argsort of [B, L, E].
    Raises InputInvalid where n is not 1 .. E.
    """
    num_experts = probabilities.shape[-1]
    if not 1 <= n <= num_experts:
        raise InputInvalid(
            f"{n} experts of a layer were asked for, expected 1 to {num_experts}.",
            remedy="Ask for as many as can be fetched in time; twice the routed ones is a good start.",
        )
    # Adding 0 makes -0.0, whose bits are those of a large number, 0.
    bits = (np.asarray(probabilities, np.float32) + np.float32(0.0)).view(np.int32)
    keys = bits.astype(np.int64)
    keys <<= ID_BITS
    np.subtract(_IDS[:num_experts], keys, out=keys)
    if n < num_experts * SELECT_BELOW:
        keys = np.partition(keys, n - 1, axis=-1)[..., :n]
    keys.sort(axis=-1)
    keys = keys[..., :n]
    experts = keys & ID_MASK
    ranked = (experts - keys) >> ID_BITS
    return experts.astype(np.int32), ranked.astype(np.int32).view(np.float32)


def expected_recall(ranked: Float[np.ndarray, "... n"], top_k: int) -> Float[np.ndarray, "..."]:
    """The share of the routed experts expected among the listed ones: the sum of their probabilities over K.

    As true as the probabilities are calibrated; 1 at most.
    """
    recall: Float[np.ndarray, "..."] = np.minimum(ranked.sum(axis=-1) / top_k, 1.0)
    return recall
