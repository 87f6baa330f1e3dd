"""Which groups of rows come together: a timeline of arrivals, and how often two groups are near each other on it.

What one source sends comes and goes together, however unlike its rows are: the templates of one log system start, pause
and return at the same times. Over a window of neighbours on the timeline, with C the pairs of rows from two groups that
are neighbours and E what a thorough mixing of all arrivals would give, the excess C - E normalised by each group's own
excess is a correlation: about 1 for parts of one source, below 0 for sources that follow one another. Where everything
arrives mixed no group has an excess, and the timeline says nothing.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

__all__ = ["Timeline", "Together", "floods"]

NEIGHBOURS = 32  # arrivals on either side that count as near
KEPT = 8192  # newest arrivals that are remembered
SHRINKAGE = 8.0  # pairs: what a correlation of few rows is drawn to 0 with
BURSTY_SHARE, BURSTY_DEVIATIONS = (
    0.25,
    3.0,
)  # excess over mixing from which a group is said to come in a burst
TOGETHER, APART = 0.5, 0.25  # correlations of one source, and of two
AMID = 0.25  # share of the rarer order among pairs of neighbours, from which neither group only follows the other
FLOOD_ROWS = 16  # rows of one kind within one ordinary interval between records


@dataclass(slots=True)
class Together:
    """Pairs of neighbours between groups, (g, g) float64 each: `before`, found with the line's group first; `expected`,
    in either order. `arrivals`: (g,) of each group's on the timeline. Sums under merging."""

    before: np.ndarray
    expected: np.ndarray
    arrivals: np.ndarray

    def merge(self, into: int, other: int) -> None:
        """Group `other` is a part of `into` from now on; its own line and column lose their meaning."""
        for table in (self.before, self.expected):
            table[into] += table[other]
            table[:, into] += table[:, other]
        self.arrivals[into] += self.arrivals[other]

    def verdicts(self, group: int) -> np.ndarray:
        """(g,) int64: 1 comes together with this group, -1 comes apart from it, 0 the timeline cannot say."""
        expected = np.diag(self.expected)
        excess = np.maximum(2.0 * np.diag(self.before) - expected, 0.0)
        least = np.maximum(BURSTY_SHARE * expected, BURSTY_DEVIATIONS * np.sqrt(2.0 * expected + 1.0))
        is_bursty = excess >= least
        between = self.before[group] + self.before[:, group] - self.expected[group]
        correlation = between / (np.sqrt(excess * excess[group]) + SHRINKAGE)
        verdict = np.where(correlation >= TOGETHER, 1, np.where(correlation <= APART, -1, 0))
        return np.where(is_bursty & is_bursty[group], verdict, 0)

    def is_amid(self, group: int) -> np.ndarray:
        """(g,) bool: neighbours of this group come both before and after it, as what begins right after them cannot."""
        earlier, later = self.before[:, group], self.before[group]
        return np.asarray(np.minimum(earlier, later) >= AMID * (earlier + later))


class Timeline:
    """When rows came, in record time; the newest `KEPT`."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}
        self._owners: dict[str, str] = {}

    def note(self, row_id: str, time_ms: int, owner: str | None = None) -> None:
        """A row arrived, and whose it is, once that is known."""
        self._times.setdefault(row_id, time_ms)
        if owner is not None:
            self._owners[row_id] = owner
        if len(self._times) > 2 * KEPT:
            kept = sorted(self._times.items(), key=lambda item: (item[1], item[0]))[-KEPT:]
            self._times = dict(kept)
            self._owners = {row: owner for row, owner in self._owners.items() if row in self._times}

    def interval_ms(self) -> float:
        """The ordinary time between two records: the mean without the longest tenth, so that pauses do not count."""
        gaps = np.sort(np.diff(np.sort(np.fromiter(self._times.values(), dtype=np.int64))))
        ordinary = gaps[: len(gaps) - len(gaps) // 10]
        return float(ordinary.mean()) if len(ordinary) else 0.0

    def together(
        self, groups: Mapping[str, int], owners: Mapping[str, int], count: int, left_out: AbstractSet[str]
    ) -> Together:
        """Neighbouring pairs of `count` groups; rows in `left_out` are as if never sent.

        groups: row id → group, for rows that wait; owners: expert → group, for rows that are an expert's.
        """
        present = [item for item in self._times.items() if item[0] not in left_out]
        ordered = sorted(present, key=lambda item: (item[1], item[0]))[-KEPT:]
        whose = [owners.get(self._owners.get(row_id, ""), -1) for row_id, _ in ordered]
        mine = [groups.get(row_id, owner) for (row_id, _), owner in zip(ordered, whose, strict=True)]
        labels = np.array(mine, dtype=np.int64)
        total = len(labels)
        before = np.zeros((count, count))
        for step in range(1, min(NEIGHBOURS, total - 1) + 1):
            first, second = labels[:-step], labels[step:]
            is_known = (first >= 0) & (second >= 0)
            np.add.at(before, (first[is_known], second[is_known]), 1.0)
        known = np.flatnonzero(labels >= 0)
        near = np.minimum(known, NEIGHBOURS) + np.minimum(total - 1 - known, NEIGHBOURS)
        sizes = np.bincount(labels[known], minlength=count)
        expected = np.outer(np.bincount(labels[known], near, count), sizes / max(total - 1, 1))
        return Together(before, (expected + expected.T) / 2.0, sizes)


def floods(times_ms: np.ndarray, groups: np.ndarray, interval_ms: float) -> np.ndarray:
    """(n,) bool: rows that came with more than `FLOOD_ROWS` of their group in one ordinary interval between records.

    times_ms, groups: (n,) int64. Nothing is a flood where records have no ordinary interval: all of one moment.
    """
    if not len(times_ms) or interval_ms <= 0:
        return np.zeros(len(times_ms), dtype=bool)
    interval = np.floor(times_ms / interval_ms).astype(np.int64)
    _, line, sizes = np.unique(
        np.stack([groups, interval], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    return np.asarray(sizes[line.ravel()] > FLOOD_ROWS)
