"""Tokens of the last few whose routing was most like this token's, as far as its layers were seen.

Tokens of one text that were routed alike in some layers are routed alike in the next ones, and those that
follow tokens that were routed alike, too. So the last W tokens are ranked anew after each layer: by how many
experts they share with this one, how many the tokens before them share with those before this one, whether
they are of the same id, and how long ago they were. The best ones' routing foretells this one's.

Window -> window, alike, preceding of a training batch -> scores -> the most similar ones' routing, as a map
[L, E]

The predictor that does so is `training.predictors.prefix`; its `step` graph does the same from the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int16, Int64, UInt8, UInt16
from torch import Tensor

from traces.trace import RoutingTrace
from training.repeats import spread

# What a token of the window has in common with the present one.
ABSENT, PRESENT, SAME_ID, SAME_PAIR = range(4)
# The score of a token that is not there; half precision holds it.
NEVER = -1e4
# What every expert has to begin with: of these sums roots are taken, whose slope must not be infinite.
LEAST = 1e-4
# Tokens compared with their windows at once: as many columns of routing fit into the cache.
AT_ONCE = 256
# Weights, by layers seen: of an expert shared; of one shared lately, in the last layers; of the same id; of
# the same id after the same id; of the logarithm of how many tokens ago; of an expert that preceding tokens
# share, in all averages alike to begin with.
BEGINNING = (0.05, 0.3, 2.0, 1.0, -0.3)
PRECEDING = 0.04


def beginning(averages: int) -> Float[Tensor, "5+M"]:
    """Weights before anything is learnt. averages: of the experts that preceding tokens share, M."""
    return torch.tensor([*BEGINNING, *[PRECEDING] * averages])


class Window:
    """The W tokens before each token of a trace, newest first. W is 0 for those who do not look at them."""

    def __init__(self, trace: RoutingTrace, tokens: int) -> None:
        self._experts = trace.experts
        self._ids = None if trace.token_ids is None else trace.token_ids.astype(np.int64)
        self._position = np.arange(trace.num_tokens) - np.repeat(trace.starts[:-1], np.diff(trace.starts))
        self._ages = np.arange(1, tokens + 1)
        self._shared = _shared_with_window(trace, tokens)

    def experts(self, tokens: Int64[np.ndarray, "N"]) -> Int16[np.ndarray, "N W L K"]:
        """What they were routed to; of those that are absent, anything."""
        return self._experts[self._before(tokens)]

    def shared(self, tokens: Int64[np.ndarray, "*N"]) -> Float[Tensor, "*N W"]:
        """How many experts each shares with a token, over all layers; 0 where absent."""
        return torch.from_numpy(self._shared[tokens].astype(np.float32))

    def alike(self, tokens: Int64[np.ndarray, "N"]) -> UInt8[np.ndarray, "N W"]:
        """ABSENT, PRESENT, SAME_ID or SAME_PAIR."""
        there = self._ages <= self._position[tokens, None]
        if self._ids is None:
            return there.astype(np.uint8)
        ids = self._ids
        same = there & (ids[self._before(tokens)] == ids[tokens, None]) & (ids[tokens, None] >= 0)
        followed = same & (self._ages < self._position[tokens, None])
        before = ids[np.maximum(tokens - 1, 0), None]
        pair = followed & (ids[np.maximum(self._before(tokens) - 1, 0)] == before) & (before >= 0)
        return there.astype(np.uint8) + same + pair

    def _before(self, tokens: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N W"]:
        return np.maximum(tokens[:, None] - self._ages, 0)


def _shared_with_window(trace: RoutingTrace, window: int) -> UInt16[np.ndarray, "N W"]:
    """By token and token of its window, newest first: how many experts they share, over all layers."""
    found = np.zeros((trace.num_tokens, window), np.uint16)
    for sequence in range(trace.num_sequences if window else 0):
        tokens = trace.sequence(sequence)
        for first in range(tokens.start, tokens.stop, AT_ONCE):
            last, begin = min(first + AT_ONCE, tokens.stop), max(tokens.start, first - window)
            experts = torch.from_numpy(trace.experts[begin:last].astype(np.int64))
            routed = torch.zeros(*experts.shape[:2], trace.spec.num_experts).scatter_(2, experts, 1.0)
            both = routed[first - begin :].flatten(1) @ routed.flatten(1).T
            other = torch.arange(first - begin, last - begin)[:, None] - torch.arange(1, window + 1)
            found[first:last] = (both.gather(1, other.clamp(min=0)) * (other >= 0)).numpy()
    return found


def without_ids(alike: Int[Tensor, "B W"], hidden: Bool[Tensor, "B"]) -> Int[Tensor, "B W"]:
    """The same, some tokens as if no id were known."""
    return torch.where(hidden[:, None], alike.clamp(max=PRESENT), alike)


def shared(routed: Float[Tensor, "B L E"], window: Int[Tensor, "B W L K"]) -> Float[Tensor, "B W L"]:
    """How many experts each token of the window has in common with this one, by layer."""
    of_window = routed[:, None].expand(-1, window.shape[1], -1, -1)
    return of_window.gather(-1, window.long()).sum(-1)


def scores(
    weights: Float[Tensor, "B P 5+M"],
    alike: Int[Tensor, "B W"],
    plain: Float[Tensor, "B P W"],
    lately: Float[Tensor, "B P W"],
    preceding: Float[Tensor, "B M W"],
) -> Float[Tensor, "B P W"]:
    """How similar each token of the window is, for each prefix of layers seen.

    weights: those of the prefix. plain, lately: experts shared in the layers seen, and fading with their
    distance from the last one. preceding: those that preceding tokens share.
    """
    same, pair = ((alike >= kind).to(weights)[:, None] for kind in (SAME_ID, SAME_PAIR))
    age = torch.log(torch.arange(1, alike.shape[1] + 1, device=alike.device, dtype=weights.dtype))
    shared_all, shared_lately, of_id, of_pair, of_age, *_ = weights[..., None].unbind(2)
    score = shared_all * plain + shared_lately * lately + of_id * same + of_pair * pair + of_age * age
    score = score + weights[..., len(BEGINNING) :] @ preceding
    return score.masked_fill((alike == ABSENT)[:, None], NEVER)


@dataclass(frozen=True)
class MostSimilar:
    """The J most similar tokens: their places in the window, and what each of them counts.

    By the softmax of their scores, beside a 0 that stands for none of them. ranks: what the first, the second
    expert of each counts.
    """

    place: Int64[Tensor, "B P J"]
    share: Float[Tensor, "B P J"]
    ranks: Float[Tensor, "K"]

    @classmethod
    def by(cls, score: Float[Tensor, "B P W"], count: int, ranks: Float[Tensor, "K"]) -> MostSimilar:
        """Those of the highest scores."""
        best, place = score.topk(count)
        return cls(place, torch.nn.functional.pad(best, (0, 1)).softmax(-1)[..., :-1], ranks)

    def of(self, prefixes: Int64[Tensor, "B P"]) -> MostSimilar:
        """Those of some of the prefixes."""
        rows = torch.arange(len(prefixes), device=prefixes.device)[:, None]
        return MostSimilar(self.place[rows, prefixes], self.share[rows, prefixes], self.ranks)

    def routing(self, window: Int[Tensor, "B W L K"], num_experts: int) -> Float[Tensor, "B P L E"]:
        """The sum of their routing, and LEAST."""
        rows = torch.arange(len(window), device=window.device)[:, None, None]
        return spread(window[rows, self.place], self.share, self.ranks, num_experts) + LEAST

    def routing_ahead(
        self, window: Int[Tensor, "B W L K"], early: int, num_experts: int
    ) -> Float[Tensor, "B S E"]:
        """Of the prefix of s layers, their `routing` in layer s + early alone; as long as there is one."""
        target = torch.arange(early, window.shape[2], device=window.device)
        rows = torch.arange(len(window), device=window.device)[:, None, None]
        place, share = (x[:, : len(target)] for x in (self.place, self.share))
        experts = window[rows, place, target[:, None]].long()  # B S J K
        empty = share.new_full((*place.shape[:2], num_experts), LEAST)
        return empty.scatter_add(2, experts.flatten(2), (share[..., None] * self.ranks).flatten(2))
