"""Merging rows into groups, and groups into clusters, in numpy; nothing is known here of what a row is.

    average_linkage   rows by similarity alone (UPGMA), down to a threshold: tight groups
    merge_groups      those groups by similarity and by whether they come together, some of them fixed

Every merge looks for new nearest neighbours only where the old ones went, so that a few thousand rows take well under a
second.
"""

from dataclasses import dataclass

import numpy as np

from dylora_stream.core.arrivals import Together

__all__ = ["FEWEST_ROWS", "Groups", "MergeRules", "average_linkage", "merge_groups"]

FEWEST_ROWS = 3  # of a group that the timeline can say something about,
OFTEN = 8  # ... or arrivals: a text that comes again and again is one row
RATIO_ROWS = 4  # ... whose own similarity can be told
LEAST_COHESION = 0.05


def average_linkage(similarity: np.ndarray, threshold: float) -> np.ndarray:
    """Merge the two clusters of largest average similarity until none reaches the threshold.

    similarity: (n, n), symmetric. Returns labels (n,) int64: each row's cluster is named by its first row.
    """
    size = len(similarity)
    table = similarity.astype(np.float64)
    np.fill_diagonal(table, -np.inf)
    labels, counts = np.arange(size), np.ones(size)
    nearest = table.argmax(axis=1)
    best = table[np.arange(size), nearest]
    while size > 1 and best.max() >= threshold:
        left = int(best.argmax())
        left, right = sorted((left, int(nearest[left])))
        merged = (counts[left] * table[left] + counts[right] * table[right]) / (counts[left] + counts[right])
        merged[[left, right]] = -np.inf
        table[left], table[:, left] = merged, merged
        table[right], table[:, right] = -np.inf, -np.inf
        counts[left] += counts[right]
        labels[labels == right] = left
        best[right] = -np.inf
        moved = ((nearest == left) | (nearest == right)) & np.isfinite(best)
        stale = np.union1d(np.flatnonzero(moved), [left])
        nearest[stale] = table[stale].argmax(axis=1)
        best[stale] = table[stale, nearest[stale]]
    return labels


@dataclass(frozen=True, slots=True)
class MergeRules:
    """When two groups are one."""

    join: float
    """Average similarity that two groups must have at least."""
    kinship: float
    """... and its least share of the groups' own similarity (geometric mean): 1 for halves drawn from one skill."""
    together: float
    """What coming together adds to a similarity, and coming apart takes from it."""


class Groups:
    """Groups of rows; the last `fixed` ones are experts, which take groups in and never merge with one another.

    Invariant: `parent[g]` is the group that g went into, itself while it stands.
    """

    def __init__(self, similarity: np.ndarray, labels: np.ndarray, fixed: int, together: Together) -> None:
        """similarity: (n, n) of rows; labels: (n,) group of each row, 0..g-1, every group with a row."""
        count = int(labels.max()) + 1
        member = np.zeros((len(labels), count), dtype=np.float32)
        member[np.arange(len(labels)), labels] = 1.0
        self.sizes = member.sum(axis=0).astype(np.float64)
        sums = (member.T @ similarity @ member).astype(np.float64)
        self._pairs = (np.diag(sums) - self.sizes) / 2.0  # similarity summed over the pairs within
        self.content = sums / np.outer(self.sizes, self.sizes)
        self.parent = np.arange(count)
        self.is_fixed = np.arange(count) >= count - fixed
        self.together = together

    @property
    def cohesion(self) -> np.ndarray:
        """(g,) average similarity of two rows of a group; 1 for a single row."""
        pairs = self.sizes * (self.sizes - 1.0) / 2.0
        return np.where(pairs > 0, self._pairs / np.maximum(pairs, 1.0), 1.0)

    def verdicts(self, group: int) -> np.ndarray:
        """(g,) what the timeline says of this group and the others; it says nothing of groups of few rows
        that came seldom.

        Nor does it say that a group is an expert's which only follows the expert's rows: so does every new skill, and
        joining is for good.
        """
        can_tell = (self.sizes >= FEWEST_ROWS) | (self.together.arrivals >= OFTEN)
        told = np.where(can_tell, self.together.verdicts(group), 0)
        follows = (self.is_fixed != self.is_fixed[group]) & ~self.together.is_amid(group)
        told[follows & (told > 0)] = 0
        return told if can_tell[group] else np.zeros_like(told)

    def scores(self, group: int, rules: MergeRules) -> np.ndarray:
        """(g,) similarity to the others as the rules see it, -inf where the two may not merge."""
        content, verdicts, cohesion = self.content[group], self.verdicts(group), self.cohesion
        score = content + rules.together * verdicts
        own = np.sqrt(np.maximum(cohesion, LEAST_COHESION) * max(cohesion[group], LEAST_COHESION))
        can_tell = (self.sizes >= RATIO_ROWS) & (self.sizes[group] >= RATIO_ROWS)
        is_kin = ~can_tell | (verdicts > 0) | (score >= rules.kinship * own)
        # With nothing but its look, a group joins an expert only where it could be a part of it.
        expert = np.where(self.is_fixed, cohesion, cohesion[group])
        if self.is_fixed[group] or self.is_fixed.any():
            crosses = self.is_fixed | self.is_fixed[group]
            inside = content >= np.maximum(expert, 3.0 * rules.join)
            is_kin &= ~crosses | (verdicts > 0) | (inside & (verdicts == 0))
        stands = self.parent == np.arange(len(self.parent))
        both_fixed = self.is_fixed & self.is_fixed[group]
        usable = is_kin & stands & ~both_fixed & (score >= rules.join)
        usable[group] = False
        return np.where(usable, score, -np.inf)

    def merge(self, into: int, other: int) -> None:
        """`other` becomes a part of `into`. An expert keeps its own similarities: what it takes in must not move it."""
        self.parent[self.parent == other] = into
        self.together.merge(into, other)
        if self.is_fixed[into]:
            return
        sizes = self.sizes[[into, other]]
        self._pairs[into] += self._pairs[other] + self.content[into, other] * sizes.prod()
        line = (sizes[0] * self.content[into] + sizes[1] * self.content[other]) / sizes.sum()
        self.content[into], self.content[:, into] = line, line
        self.sizes[into] = sizes.sum()


def merge_groups(groups: Groups, rules: MergeRules, left_out: np.ndarray) -> None:
    """Merge the two groups of highest score until none is left; those `left_out` (g,) stay as they are."""
    count = len(groups.parent)
    table = np.stack([groups.scores(group, rules) for group in range(count)])
    table[left_out], table[:, left_out] = -np.inf, -np.inf
    nearest = table.argmax(axis=1)
    best = table[np.arange(count), nearest]
    while np.isfinite(best.max()):
        left = int(best.argmax())
        left, right = sorted((left, int(nearest[left])), key=lambda g: (not groups.is_fixed[g], g))
        groups.merge(left, right)
        line = groups.scores(left, rules)
        line[left_out] = -np.inf
        table[left], table[:, left] = line, line
        table[right], table[:, right] = -np.inf, -np.inf
        nearest = table.argmax(axis=1)
        best = table[np.arange(count), nearest]
