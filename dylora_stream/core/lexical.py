"""Lexical features: what token ids and bytes alone say of a text. No model, so they are free beside a forward pass.

Style tells skills apart where meaning does not: markers, punctuation, case, digits, line breaks. Leave one task out on
`continual/bare`, inputs alone (AUROC mean / worst): hashed tokens 0.911 / 0.824, hashed bytes 0.906 / 0.802, surface
0.858 / 0.626, all three 0.980 / 0.897, with stem states 0.993 / 0.969; stem states alone 0.943 / 0.846.

Hashing (Weinberger et al. 2009, 0902.2206) is a fixed function: multiplicative, never Python's salted `hash`.
"""

import zlib
from collections.abc import Sequence

import numpy as np

__all__ = [
    "ANSWER_TOKENS", "BYTES", "SURFACE", "TOKENS", "answer_tokens", "hashed_bytes", "hashed_tokens", "surface",
]  # fmt: skip

TOKENS = 512  # numbers of `hashed_tokens`
BYTES = 512  # numbers of `hashed_bytes`
PUNCTUATION = b",.:;?!\"'()[]{}<>=/-_*@#$%&+|\\"
SPACED = b",.!?'"  # counted where a blank stands before them: the mark of tokenised text
SURFACE = 6 + len(PUNCTUATION) + len(SPACED) + 5  # numbers of `surface`
ANSWER_PART = 128
ANSWER_TOKENS = 2 * ANSWER_PART + 1  # numbers of `answer_tokens`
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)  # splitmix64's
TINY = 1e-9


def hashed_tokens(ids: Sequence[Sequence[int]], dimensions: int = TOKENS) -> np.ndarray:
    """(n, dimensions) float32 of length 1: signed log counts of token ids."""
    return _unit(
        np.stack([_signed([np.asarray(row, np.uint64)], dimensions) for row in ids])
        if ids
        else np.zeros((0, dimensions), np.float32)
    )


def hashed_bytes(texts: Sequence[str], dimensions: int = BYTES) -> np.ndarray:
    """(n, dimensions) float32 of length 1: signed log counts of one, two and three bytes in a row (UTF-8)."""
    rows = np.zeros((len(texts), dimensions), np.float32)
    for row, text in enumerate(texts):
        data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint64)
        grams = [data + np.uint64(1 << 32)]
        grams.append(data[:-1] * np.uint64(256) + data[1:] + np.uint64(2 << 32))
        grams.append(
            (data[:-2] * np.uint64(256) + data[1:-1]) * np.uint64(256) + data[2:] + np.uint64(3 << 32)
        )
        rows[row] = _signed(grams, dimensions)
    return _unit(rows)


def surface(texts: Sequence[str]) -> np.ndarray:
    """(n, SURFACE) float32: lengths, shares of digits and capitals, punctuation, how the text begins and ends."""
    return np.stack([_surface(text) for text in texts]) if texts else np.zeros((0, SURFACE), np.float32)


def answer_tokens(ids: Sequence[Sequence[int]], answers: Sequence[str]) -> np.ndarray:
    """(n, ANSWER_TOKENS) float32: hashed tokens and pairs of them, the whole answer's hash, log of the token count."""
    parts = np.zeros((len(ids), ANSWER_TOKENS), np.float32)
    for row, (tokens, answer) in enumerate(zip(ids, answers, strict=True)):
        single = np.asarray(tokens, np.uint64)
        pairs = single[:-1] * np.uint64(1 << 20) + single[1:] + np.uint64(1 << 48)
        parts[row, :ANSWER_PART] = _signed([single, pairs], ANSWER_PART)
        whole = np.array([zlib.crc32(answer.strip().encode("utf-8", "replace"))], np.uint64)
        parts[row, ANSWER_PART:-1] = _signed([whole], ANSWER_PART)
        parts[row, -1] = np.log1p(len(tokens))
    parts[:, :ANSWER_PART] = _unit(parts[:, :ANSWER_PART])
    parts[:, ANSWER_PART:-1] = 0.5 * _unit(parts[:, ANSWER_PART:-1])
    return parts


def _signed(grams: Sequence[np.ndarray], dimensions: int) -> np.ndarray:
    """(dimensions,) log counts of buckets, half of the keys counted negatively."""
    keys = np.concatenate(grams) * np.uint64(MULTIPLIERS[0])
    keys ^= keys >> np.uint64(31)
    keys *= np.uint64(MULTIPLIERS[1])
    keys ^= keys >> np.uint64(27)
    buckets = (keys % np.uint64(2 * dimensions)).astype(np.int64)
    counts = np.log1p(np.bincount(buckets, minlength=2 * dimensions))
    return np.asarray(counts[:dimensions] - counts[dimensions:], np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, TINY), np.float32)


def _surface(text: str) -> np.ndarray:
    """(SURFACE,) of one text; an empty one is all zero."""
    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    result = np.zeros(SURFACE, np.float32)
    if not len(data):
        return result
    counts = np.bincount(data, minlength=256).astype(np.float64)
    is_blank = (data == ord(" ")) | (data == ord("\n")) | (data == ord("\t"))
    words = int((~is_blank & np.concatenate([[True], is_blank[:-1]])).sum())
    root = np.sqrt(len(data))
    spaced = np.bincount(data[1:][data[:-1] == ord(" ")], minlength=256)
    last, first = int(data[-1]), int(data[0])
    result[:6] = (
        np.log1p(len(data)),
        np.log1p(words),
        (len(data) - is_blank.sum()) / max(words, 1),
        np.log1p(counts[ord("\n")]),
        counts[ord("0") : ord("9") + 1].sum() / root,
        counts[ord("A") : ord("Z") + 1].sum() / root,
    )
    end = 6 + len(PUNCTUATION)
    result[6:end] = np.log1p(counts[list(PUNCTUATION)])
    result[end : end + len(SPACED)] = np.log1p(spaced[list(SPACED)])
    result[-5:] = (
        last in b".!?",
        chr(last).isalnum(),
        chr(first).isupper(),
        chr(first).islower(),
        last == ord("\n"),
    )
    return result
