"""From probabilities to the experts to fetch, best first.

experts, probabilities = rank(speculator.predict(...), n=8)
"""

from __future__ import annotations

import functools
import sys

import numpy as np
from jaxtyping import Float, Float32, Int32

from speculation.errors import InputInvalid

# Below this share of the experts, selecting before sorting is faster than sorting all.
SELECT_BELOW = 1 / 8
ZERO = np.float32(0)


def rank(
    probabilities: Float[np.ndarray, "... E"], n: int
) -> tuple[Int32[np.ndarray, "... n"], Float32[np.ndarray, "... n"]]:
    """The n likeliest experts of each row, best first, and their probabilities. Ties: the lower id first.

    Sorts one integer of 64 bits an expert instead of an index: above, the bits of the float, which from 0 on
    are ordered as the float is; below, the id counted from the end, so that it breaks ties. Both are views of
    the same memory. Two to ten times faster than a stable argsort of [B, L, E].
    Raises InputInvalid where n is not 1 .. E.
    """
    num_experts = probabilities.shape[-1]
    if not 1 <= n <= num_experts:
        raise InputInvalid(
            f"{n} experts of a layer were asked for, expected 1 to {num_experts}.",
            remedy="Ask for as many as can be fetched in time; twice the routed ones is a good start.",
        )
    halves = np.empty((*probabilities.shape, 2), np.int32)
    halves[..., LOW] = _from_the_end(num_experts)
    # Adding 0 makes -0.0, whose bits are those of a negative number, 0.
    np.add(probabilities, ZERO, out=halves.view(np.float32)[..., HIGH], casting="same_kind")
    keys = halves.view(np.int64)[..., 0]
    if n < num_experts * SELECT_BELOW:
        keys = np.partition(keys, num_experts - n, axis=-1)[..., num_experts - n :]
        halves = keys.copy()[..., None].view(np.int32)
        keys = halves.view(np.int64)[..., 0]
    keys.sort(axis=-1)
    best = halves[..., : -n - 1 : -1, :]
    return np.int32(num_experts - 1) - best[..., LOW], best[..., HIGH].view(np.float32)


# Where a key of 64 bits has its halves.
LOW, HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)


@functools.cache
def _from_the_end(num_experts: int) -> Int32[np.ndarray, "E"]:
    """How many ids come after each."""
    return np.arange(num_experts - 1, -1, -1, dtype=np.int32)


def expected_recall(ranked: Float[np.ndarray, "... n"], top_k: int) -> Float[np.ndarray, "..."]:
    """The share of the routed experts expected among the listed ones: the sum of their probabilities over K.

    As true as the probabilities are calibrated; 1 at most.
    """
    recall: Float[np.ndarray, "..."] = np.minimum(ranked.sum(axis=-1) / top_k, 1.0)
    return recall
