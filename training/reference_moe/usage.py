"""How evenly experts are used, and how far their use tells one kind of text from another.

    python -c "from training.reference_moe.usage import entropy; import numpy; print(entropy(numpy.eye(8)))"

`report` counts; numpy in, numpy out.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64


def entropy(counts: Float[np.ndarray, "*L E"]) -> Float[np.ndarray, "*L"]:
    """Entropy of an expert's use, as a share of the most there can be (log E): 1 where all are used alike."""
    share = counts / counts.sum(-1, keepdims=True)
    return _entropy(share) / np.log(counts.shape[-1])


def shares(counts: Int64[np.ndarray, "D L E"]) -> Float[np.ndarray, "D L E"]:
    """How much each expert is used in each domain; a domain's experts add up to 1."""
    result: Float[np.ndarray, "D L E"] = counts / counts.sum(-1, keepdims=True)
    return result


def told_by_expert(counts: Int64[np.ndarray, "D L E"]) -> Float[np.ndarray, "L"]:
    """What one routed expert tells of the domain, in bits: mutual information, every domain as likely.

    0 where all domains use the experts alike, log2 D where no two domains share one.
    """
    share = shares(counts)
    result: Float[np.ndarray, "L"] = (_entropy(share.mean(0)) - _entropy(share).mean(0)) / np.log(2)
    return result


def _entropy(share: Float[np.ndarray, "*L E"]) -> Float[np.ndarray, "*L"]:
    safe = np.where(share > 0, share, 1.0)
    result: Float[np.ndarray, "*L"] = -(share * np.log(safe)).sum(-1)
    return result
