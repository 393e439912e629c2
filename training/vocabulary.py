"""Which row of a token table a token id has: its own if it was seen often enough, else one it shares.

A tokenizer made by byte-pair encoding numbers its tokens roughly from frequent to rare, so ids never seen in
training share a row with ids of about the same size: row 1 + floor(log2(id + 1)).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

# Row 0 is "no token id"; rows 1..31 are shared by size of the id; the vocabulary's own rows come after.
UNKNOWN_ROW = 0
SHARED_ROWS = 32
# An id seen once teaches its row nothing that holds for other sequences.
MIN_COUNT = 2


class Vocabulary:
    """Token ids with a row of their own. `known`: those ids, ascending; empty where a trace has none."""

    def __init__(self, known: Int64[np.ndarray, "V"]) -> None:
        self.known = np.asarray(known, np.int64)

    @classmethod
    def of(cls, token_ids: Int64[np.ndarray, "N"] | None) -> Vocabulary:
        """The ids that occur at least twice in `token_ids`."""
        if token_ids is None:
            return cls(np.empty(0, np.int64))
        ids, counts = np.unique(token_ids, return_counts=True)
        return cls(ids[(counts >= MIN_COUNT) & (ids >= 0)])

    @property
    def num_rows(self) -> int:
        """Rows of the token table, shared ones included; 1 where the vocabulary is empty."""
        return SHARED_ROWS + len(self.known) if len(self.known) else 1

    def rows(self, token_ids: Int64[np.ndarray, "*N"]) -> Int64[np.ndarray, "*N"]:
        """The row of each id; 0 everywhere where the vocabulary is empty."""
        if not len(self.known):
            return self.shared_rows(token_ids)
        place = np.minimum(np.searchsorted(self.known, token_ids), len(self.known) - 1)
        own = self.known[place] == token_ids
        return np.where(own, SHARED_ROWS + place, self.shared_rows(token_ids))

    def shared_rows(self, token_ids: Int64[np.ndarray, "*N"]) -> Int64[np.ndarray, "*N"]:
        """The rows these ids would have if none had its own: 0 where negative (unknown), else by size."""
        if not len(self.known):
            return np.zeros_like(token_ids)
        # Ids past the largest known one are alike: the served table ends there.
        capped = np.clip(token_ids, 0, self.known[-1] + 1)
        size = np.floor(np.log2(capped + 1.0)).astype(np.int64)
        return np.where(token_ids < 0, UNKNOWN_ROW, np.minimum(1 + size, SHARED_ROWS - 1))
