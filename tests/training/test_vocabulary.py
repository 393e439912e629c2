"""Rows of token ids: their own, shared by size, or none."""

import numpy as np

from training.vocabulary import PAIR_SLOTS, SHARED_ROWS, Vocabulary

VOCABULARY = Vocabulary.of(np.array([5, 5, 9, 900, 900, 7, -1, -1]), np.array([0, 8]))
# 5 before 9 in both sequences; 9 before 9 in one, and 9 before 5 only where one ends and the next begins.
PAIRED = Vocabulary.of(np.array([5, 9, 9, 5, 9, 2]), np.array([0, 3, 6]))


def test_ids_seen_twice_have_a_row_of_their_own() -> None:
    assert VOCABULARY.known.tolist() == [5, 900]
    assert VOCABULARY.rows(np.array([5, 900])).tolist() == [SHARED_ROWS, SHARED_ROWS + 1]


def test_other_ids_share_a_row_with_ids_of_their_size() -> None:
    rows = VOCABULARY.rows(np.array([0, 1, 7, 8, 12, 600]))
    assert rows.tolist() == [1, 2, 4, 4, 4, 10]


def test_an_unknown_id_has_row_zero() -> None:
    assert VOCABULARY.rows(np.array([-1])).tolist() == [0]


def test_ids_past_the_largest_known_one_are_alike() -> None:
    assert len(set(VOCABULARY.rows(np.array([901, 10_000, 10**9])).tolist())) == 1


def test_a_trace_without_ids_has_an_empty_vocabulary() -> None:
    empty = Vocabulary.of(None, np.array([0]))
    assert (empty.num_rows, empty.rows(np.array([3, -1])).tolist()) == (1, [0, 0])


def test_rows_are_inside_the_table() -> None:
    rows = VOCABULARY.rows(np.arange(-1, 2000))
    assert rows.min() == 0 and rows.max() < VOCABULARY.num_rows


def test_pairs_in_two_sequences_have_a_row_of_their_own() -> None:
    assert PAIRED.pairs.tolist() == [[5, 9]]
    assert PAIRED.pair_rows(np.array([9]), np.array([5])).tolist() == [PAIRED.num_rows - 1]


def test_other_pairs_have_row_zero() -> None:
    rows = PAIRED.pair_rows(np.array([5, 9, 9, 2, -1]), np.array([9, 9, -1, 9, -1]))
    assert rows.tolist() == [0] * 5


def test_rows_of_tokens_end_with_the_pair_of_the_newest_two() -> None:
    rows = PAIRED.rows_of_tokens(np.array([[9, 5, 5], [5, -1, -1]]))
    assert rows.tolist() == [
        [SHARED_ROWS + 1, SHARED_ROWS, SHARED_ROWS, PAIRED.num_rows - 1],
        [SHARED_ROWS, 0, 0, 0],
    ]


def test_no_two_pairs_share_a_slot() -> None:
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary.of(np.tile(rng.integers(0, 300, 20_000), 2), np.array([0, 20_000, 40_000]))
    before, token = vocabulary.pairs.T
    slots = vocabulary.pair_keys(token, before) % PAIR_SLOTS
    assert len(vocabulary.pairs) > 10_000 and len(np.unique(slots)) == len(slots)
