"""Where a token stood before in its sequence, and what it was routed to there.

A model routes a token much as it routed the same token some lines above, more so where the token before it
was the same, too. So the last few such places are looked up, by id alone, in a window of earlier tokens. Of
what a place was routed to, the strongest expert counts most: one just above the next best may be missed the
next time.

places -> spread -> repeats [.., ORDERS, L, E] of a training batch; `Begin` does the same from its window
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from traces.trace import RoutingTrace

# The same id; the same id after the same id.
ORDERS = 2
# By how much more, and less, than 1 the strongest and the weakest expert count. Weights that are learnt
# (`similar.MostSimilar.ranks`) fall about as steeply.
RANK_SPREAD = 0.5


def places(trace: RoutingTrace, window: int, most: int) -> Int32[np.ndarray, "N 2 J"]:
    """Token numbers of each token's earlier places, newest first; -1 where there are no more.

    window: how many tokens back they may be. most: J.
    """
    found = np.full((trace.num_tokens, ORDERS, most), -1, np.int32)
    if trace.token_ids is None:
        return found
    for sequence in range(trace.num_sequences):
        tokens = trace.sequence(sequence)
        ids = trace.token_ids[tokens].tolist()
        last: dict[tuple[int, ...], list[int]] = {}
        for position, token in enumerate(ids):
            before = ids[position - 1] if position else -1
            keys = [(token,), (before, token)] if before >= 0 else [(token,)]
            for order, key in enumerate(keys if token >= 0 else []):
                earlier = last.setdefault(key, [])
                near = [tokens.start + place for place in earlier if position - place <= window]
                found[tokens.start + position, order, : len(near)] = near
                last[key] = [position, *earlier[: most - 1]]
    return found


def place_weights(count: int, decay: float) -> Float[Tensor, "J"]:
    """What each place counts: `decay` times as much as the next newer one, 1 if all are found.

    Where fewer are found, they count less together: a single place is weak evidence.
    """
    weights = decay ** torch.arange(count, dtype=torch.float32)
    return weights / weights.sum()


def rank_weights(top_k: int) -> Float[Tensor, "K"]:
    """What the first, the second of a place's experts by falling gate counts; 1 on average."""
    return torch.linspace(1 + RANK_SPREAD, 1 - RANK_SPREAD, top_k) if top_k > 1 else torch.ones(1)


def spread(
    experts: Int[Tensor, "*N J L K"],
    weights: Float[Tensor, "*N J"],
    ranks: Float[Tensor, "K"],
    num_experts: int,
) -> Float[Tensor, "*N L E"]:
    """The places' routing, added up: of each expert, how much weight went to it.

    ranks: what the first, the second expert of a place counts.
    """
    *batch, count, layers, top_k = experts.shape
    first = torch.arange(layers, device=experts.device)[:, None] * num_experts
    target = (experts.long() + first).reshape(*batch, count * layers * top_k)
    by_rank = weights[..., None] * ranks
    share = by_rank[..., None, :].expand(*batch, count, layers, top_k).reshape(target.shape)
    empty = torch.zeros(*batch, layers * num_experts, device=experts.device)
    return empty.scatter_add(-1, target, share).unflatten(-1, (layers, num_experts))
