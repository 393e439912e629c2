"""Rows of token ids: their own, shared by size, or none."""

import numpy as np

from training.vocabulary import SHARED_ROWS, Vocabulary

VOCABULARY = Vocabulary.of(np.array([5, 5, 9, 900, 900, 7, -1, -1]))


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
    empty = Vocabulary.of(None)
    assert (empty.num_rows, empty.rows(np.array([3, -1])).tolist()) == (1, [0, 0])


def test_rows_are_inside_the_table() -> None:
    rows = VOCABULARY.rows(np.arange(-1, 2000))
    assert rows.min() == 0 and rows.max() < VOCABULARY.num_rows
