"""Which rows of a token table a token has: one of its id, and one of the pair it makes with the token before.

An id has a row of its own if it was seen often enough. A tokenizer made by byte-pair encoding numbers its
tokens roughly from frequent to rare, so ids never seen in training share a row with ids of about the same
size: row 1 + floor(log2(id + 1)). Two ids that follow each other in several sequences have a row besides.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

# Row 0 is "no token id"; rows 1..31 are shared by size of the id; the vocabulary's own rows come after.
UNKNOWN_ROW = 0
SHARED_ROWS = 32
# An id seen once teaches its row nothing that holds for other sequences.
MIN_COUNT = 2
# A pair seen in one sequence only is most often a name or a number of that text.
MIN_SEQUENCES = 2
# Pairs are found by `pair_key` modulo this; of those that fall together, the one of most sequences has a row.
PAIR_SLOTS = 1 << 15
# Keys fit into 31 bits with this many rows.
MOST_ROWS = 1 << 15


class Vocabulary:
    """Token ids and pairs of them with rows of their own.

    known: those ids, ascending; empty where a trace has none. pairs: (id before, id), both known.
    """

    def __init__(self, known: Int64[np.ndarray, "V"], pairs: Int64[np.ndarray, "P 2"] | None = None) -> None:
        self.known = np.asarray(known, np.int64)
        self.pairs = (
            np.empty((0, 2), np.int64) if pairs is None else np.asarray(pairs, np.int64).reshape(-1, 2)
        )
        keys = self.pair_keys(self.pairs[:, 1], self.pairs[:, 0])
        order = np.argsort(keys)
        self._keys, self._pair_rows = keys[order], self.id_rows + order

    @classmethod
    def of(cls, token_ids: Int64[np.ndarray, "N"] | None, starts: Int64[np.ndarray, "S+1"]) -> Vocabulary:
        """The ids that occur at least twice in `token_ids`, and their pairs in at least two sequences."""
        if token_ids is None:
            return cls(np.empty(0, np.int64))
        ids, counts = np.unique(token_ids, return_counts=True)
        of_ids = cls(ids[(counts >= MIN_COUNT) & (ids >= 0)])
        return cls(of_ids.known, of_ids._pairs_in(np.asarray(token_ids, np.int64), starts))

    def _pairs_in(
        self, token_ids: Int64[np.ndarray, "N"], starts: Int64[np.ndarray, "S+1"]
    ) -> Int64[np.ndarray, "P 2"]:
        """Pairs with a row, those of most sequences first."""
        if not 0 < self.id_rows <= MOST_ROWS:
            return self.pairs
        sequence = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        both = np.isin(token_ids, self.known)
        here = np.flatnonzero(both[1:] & both[:-1] & (sequence[1:] == sequence[:-1]))
        found = np.stack([token_ids[here], token_ids[here + 1], sequence[here]], 1)
        pairs, counts = np.unique(np.unique(found, axis=0)[:, :2], axis=0, return_counts=True)
        pairs, counts = pairs[counts >= MIN_SEQUENCES], counts[counts >= MIN_SEQUENCES]
        pairs = pairs[np.argsort(-counts, kind="stable")]
        slots = self.pair_keys(pairs[:, 1], pairs[:, 0]) % PAIR_SLOTS
        return pairs[np.sort(np.unique(slots, return_index=True)[1])]

    @property
    def id_rows(self) -> int:
        """Rows of the token table for single ids, shared ones included; 1 where the vocabulary is empty."""
        return SHARED_ROWS + len(self.known) if len(self.known) else 1

    @property
    def num_rows(self) -> int:
        """Rows of the token table: of single ids, then of pairs."""
        return self.id_rows + len(self.pairs)

    @property
    def key_step(self) -> int:
        """What the row of the id before counts in a pair's key: odd, so that all slots are used."""
        return self.id_rows | 1

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

    def pair_keys(
        self, token_ids: Int64[np.ndarray, "N"], before: Int64[np.ndarray, "N"]
    ) -> Int64[np.ndarray, "N"]:
        """One number for two ids, the same for two pairs only where their rows are."""
        return self.key_step * self.rows(before) + self.rows(token_ids)

    def pair_rows(
        self, token_ids: Int64[np.ndarray, "N"], before: Int64[np.ndarray, "N"]
    ) -> Int64[np.ndarray, "N"]:
        """The row of each pair, 0 for one that has none."""
        keys = self.pair_keys(token_ids, before)
        if not len(self._keys):
            return np.zeros_like(keys)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._pair_rows[place], UNKNOWN_ROW)

    def rows_of_tokens(self, recent: Int64[np.ndarray, "N R"]) -> Int64[np.ndarray, "N R+1"]:
        """The rows of tokens and of those before them, then of the pair each token makes with the last one.

        recent: the ids of each token and of the tokens before it, newest first.
        """
        pairs = self.pair_rows(recent[:, 0], recent[:, 1])
        return np.concatenate([self.rows(recent), pairs[:, None]], 1)
