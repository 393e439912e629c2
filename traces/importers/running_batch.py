"""Which tokens make a sequence, of a server that batches requests and does not say which is whose.

`sglang_recorder` feeds it forward passes in order. A piece of a prompt begins a sequence. A decoded token
goes on with a sequence of the running batch that ends just before its position. The batch keeps its order:
where as many sequences end before a position as there are tokens at it, they go together in order. Where the
numbers differ, nobody can tell, and each of these tokens begins a sequence: a cut does less harm than a wrong
joint.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Int32, Int64

from traces.importers.recorded import Recorded


@dataclass(frozen=True)
class Pass:
    """One forward pass of n tokens, request after request. lengths: tokens of each of its R requests.

    decodes: whether each request has one token, which was generated.
    """

    where: str
    experts: Int[np.ndarray, "n D K"]
    token_ids: Int32[np.ndarray, "n"]
    positions: Int64[np.ndarray, "n"]
    lengths: Int64[np.ndarray, "R"]
    decodes: bool


@dataclass(eq=False)
class _Text:
    """A sequence so far. end: the position after its last token."""

    where: str
    end: int
    experts: list[Int[np.ndarray, "m D K"]] = field(default_factory=list)
    token_ids: list[Int32[np.ndarray, "m"]] = field(default_factory=list)


class RunningBatch:
    """begun_within: sequences that begin at a position beyond 0."""

    def __init__(self) -> None:
        self.begun_within = 0
        self._texts: list[_Text] = []
        self._running: list[_Text] = []

    def run(self, done: Pass) -> None:
        """Take in the tokens of the next forward pass."""
        starts = (np.cumsum(done.lengths) - done.lengths).tolist()
        known = self._known(done) if done.decodes else {}
        taken = []
        for start, length in zip(starts, done.lengths.tolist(), strict=True):
            text = known.get(start) or self._begun(done.where, int(done.positions[start]))
            text.experts.append(done.experts[start : start + length])
            text.token_ids.append(done.token_ids[start : start + length])
            text.end += length
            taken.append(text)
        self._running = taken if done.decodes else self._running + taken

    def sequences(self) -> list[Recorded]:
        """All sequences, in the order in which they began."""
        return [
            Recorded(
                text.where,
                np.concatenate(text.experts),
                token_ids=np.concatenate(text.token_ids),
            )
            for text in self._texts
        ]

    def _known(self, done: Pass) -> dict[int, _Text]:
        """Of a pass of one token each: the sequences that its tokens go on with, by the token's number."""
        waiting: dict[int, list[_Text]] = defaultdict(list)
        for text in self._running:
            waiting[text.end].append(text)
        tokens: dict[int, list[int]] = defaultdict(list)
        for token, position in enumerate(done.positions.tolist()):
            tokens[position].append(token)
        return {
            token: text
            for position, at in tokens.items()
            if len(at) == len(waiting[position])
            for token, text in zip(at, waiting[position], strict=True)
        }

    def _begun(self, where: str, position: int) -> _Text:
        self.begun_within += position > 0
        text = _Text(where, position)
        self._texts.append(text)
        return text
