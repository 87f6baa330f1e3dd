"""Agglomerative clustering by average linkage (UPGMA) over a similarity matrix, in numpy.

Every merge looks for new nearest neighbours only where the old ones went, so that a few thousand rows take well under a
second. It decides nothing about which rows to compare or what becomes of a cluster.
"""

import numpy as np

__all__ = ["average_linkage"]


def average_linkage(
    similarity: np.ndarray, threshold: float, *, max_gap: float = 1.0, min_side: int = 8
) -> np.ndarray:
    """Merge the two clusters of largest average similarity until none reaches the threshold.

    Two sides of at least `min_side` rows stay apart for good where each holds together better, by more than
    `max_gap`, than they do with one another: two tight skills that share a look are not one loose skill.
    similarity: (n, n), symmetric. Returns labels (n,) int64: each row's cluster is named by its first row.
    """
    size = len(similarity)
    table = similarity.astype(np.float64)
    np.fill_diagonal(table, -np.inf)
    labels, counts, within = (
        np.arange(size),
        np.ones(size),
        np.zeros(size),
    )  # within: summed similarity of its pairs
    nearest = table.argmax(axis=1)
    best = table[np.arange(size), nearest]
    while size > 1 and best.max() >= threshold:
        left = int(best.argmax())
        left, right = sorted((left, int(nearest[left])))
        between = table[left, right]
        if (
            min(counts[left], counts[right]) >= min_side
            and _tightest(within, counts, left, right) > between + max_gap
        ):
            table[left, right] = table[right, left] = -np.inf
            stale = np.array([left, right])
        else:
            merged = (counts[left] * table[left] + counts[right] * table[right]) / (
                counts[left] + counts[right]
            )
            merged[[left, right]] = -np.inf
            table[left], table[:, left] = merged, merged
            table[right], table[:, right] = -np.inf, -np.inf
            within[left] += within[right] + between * counts[left] * counts[right]
            counts[left] += counts[right]
            labels[labels == right] = left
            best[right] = -np.inf
            stale = np.union1d(
                np.flatnonzero(((nearest == left) | (nearest == right)) & np.isfinite(best)), [left]
            )
        nearest[stale] = table[stale].argmax(axis=1)
        best[stale] = table[stale, nearest[stale]]
    return labels


def _tightest(within: np.ndarray, counts: np.ndarray, left: int, right: int) -> float:
    """The smaller of two clusters' cohesions."""
    sides = np.array([left, right])
    return float((within[sides] / (counts[sides] * (counts[sides] - 1) / 2)).min())
