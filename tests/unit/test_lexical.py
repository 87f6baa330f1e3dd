"""Lexical features: fixed functions of ids and bytes."""

import numpy as np

from dylora_stream.core.lexical import (
    ANSWER_TOKENS,
    BYTES,
    SURFACE,
    TOKENS,
    answer_tokens,
    hashed_bytes,
    hashed_tokens,
    surface,
)

TEXTS = ["Title: two words\n", "", "a", "ünï 12 .", "Title: two words\n"]


def test_hashed_rows_are_fixed_and_of_length_one() -> None:
    """The same text gives the same row, whatever stands beside it; only an empty one has length 0."""
    rows = hashed_bytes(TEXTS)
    assert rows.shape == (5, BYTES)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 0, 1, 1, 1], atol=1e-5)
    np.testing.assert_array_equal(rows[0], rows[4])
    np.testing.assert_array_equal(hashed_bytes(TEXTS[3:4])[0], rows[3])
    ids = [[5, 5, 9], [9, 5, 5], [], [7]]
    tokens = hashed_tokens(ids)
    assert tokens.shape == (4, TOKENS)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert not tokens[2].any()
    assert hashed_tokens([]).shape == (0, TOKENS)


def test_the_hash_is_the_same_in_every_process() -> None:
    """Buckets of three tokens, computed once by hand with splitmix64's multipliers in integers."""
    expected = []
    for token in (1, 2, 49_151):
        key = token * 0x9E3779B97F4A7C15 % 2**64
        key ^= key >> 31
        key = key * 0xBF58476D1CE4E5B9 % 2**64
        key ^= key >> 27
        expected.append((key % (2 * TOKENS)) % TOKENS)
    found = [int(np.flatnonzero(row)[0]) for row in hashed_tokens([[1], [2], [49_151]])]
    assert found == expected


def test_surface_counts_what_it_says() -> None:
    """Length, words, digits, capitals, punctuation behind a blank, and how the text ends."""
    rows = surface(TEXTS)
    assert rows.shape == (5, SURFACE)
    assert not rows[1].any()
    np.testing.assert_allclose(rows[0, :2], np.log1p([17, 3]), rtol=1e-6)
    assert rows[0, 5] > 0
    assert rows[3, 4] > 0
    assert rows[0, -1] == 1
    assert rows[3, -1] == 0
    assert surface([]).shape == (0, SURFACE)


def test_answers_that_read_the_same_have_the_same_row() -> None:
    """And others differ."""
    rows = answer_tokens([[1, 2], [1, 2], [3]], ["yes", " yes ", "no"])
    assert rows.shape == (3, ANSWER_TOKENS)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert np.linalg.norm(rows[0] - rows[2]) > 0.5
