"""Whether a cluster may become an expert: distinct rows, alike, that came over some time.

Scattered outliers, one text again and again, and floods of near copies found nothing. Repeats of a text count once,
rows of a flood not at all.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dylora_stream.core.arrivals import floods
from dylora_stream.core.cluster_config import ClusteringConfig
from dylora_stream.core.likeness import WaitingRow

__all__ = ["Candidate", "Cohesion", "Readiness", "cohesion_of", "newest_firsts", "readiness"]

MEASURED = 192  # newest distinct rows of a cluster whose likeness is measured
LIKES = 3  # rows of a cluster that a row must be like where the cluster as a whole is not alike
REPEATS = 4  # of one text that count when saturation is judged
MOST_UNSEEN = 0.3  # Good-Turing share of texts seen once under which a cluster is saturated


class Cohesion(NamedTuple):
    """How alike the rows of a cluster are, averages over its rows; 1.0 for a single row."""

    to_all: float
    """Similarity of two rows."""
    to_likes: float
    """Similarity of a row to the `LIKES` most like it: templates of one source have their like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A cluster in question."""

    rows: Mapping[str, WaitingRow]
    """In order of arrival."""

    cohesion: Cohesion
    """Of its `newest_firsts`."""

    interval_ms: float
    """The ordinary time between two records of the whole stream."""

    is_doubtful: bool
    """It looks like an expert's, and time has not told whether it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """The answer; `reason` is a short snake_case class: ready, or what is missing. cohesion: `Cohesion.to_all`."""

    is_ready: bool
    reason: str
    distinct_rows: int
    cohesion: float


def newest_firsts(rows: Mapping[str, WaitingRow]) -> dict[str, WaitingRow]:
    """The newest `MEASURED` rows that repeat no other."""
    return dict([(row_id, row) for row_id, row in rows.items() if row.twin is None][-MEASURED:])


def cohesion_of(similarity: np.ndarray) -> Cohesion:
    """similarity: (m, m) float32 of the rows to one another."""
    size = len(similarity)
    if size < 2:
        return Cohesion(1.0, 1.0)
    others = similarity[~np.eye(size, dtype=bool)].reshape(size, -1)
    return Cohesion(float(others.mean()), float(np.sort(others, axis=1)[:, -LIKES:].mean()))


def readiness(candidate: Candidate, min_rows: int, config: ClusteringConfig) -> Readiness:
    """Whether the cluster may become an expert of `min_rows` distinct rows.

    Fewer are enough where that many records came and most texts came again. A cluster that looks like an expert's, and
    of which time has not told, waits for twice as many; one that is mostly a flood is never ready.
    """
    rows = candidate.rows
    times = np.array([row.time_ms for row in rows.values() if row.twin is None], dtype=np.int64)
    flooded = int(floods(times, np.zeros_like(times), candidate.interval_ms).sum())
    distinct, cohesion = len(times) - flooded, candidate.cohesion
    is_saturated = len(rows) >= min_rows and distinct >= config.saturated_rows and _is_saturated(rows)
    if flooded > distinct:
        reason = "flood"
    elif distinct < min_rows and not is_saturated:
        reason = "flood" if flooded else "repeats" if len(rows) >= min_rows else "too_few_rows"
    elif cohesion.to_all < config.min_cohesion and cohesion.to_likes < config.tight_similarity:
        reason = "scattered"
    elif np.ptp(times) < config.min_span_ms:
        reason = "flood"
    elif candidate.is_doubtful and distinct < 2 * min_rows and len(rows) < 4 * min_rows:
        reason = "unsettled"
    else:
        reason = "ready"
    is_ready = reason == "ready"
    return Readiness(is_ready=is_ready, reason=reason, distinct_rows=distinct, cohesion=cohesion.to_all)


def _is_saturated(rows: Mapping[str, WaitingRow]) -> bool:
    """Whether new texts have become rare: the chance that the next one is new, by Good and Turing, with repeats of one
    text counted a few times at most, so that no single text can make it small."""
    copies = Counter(row.twin or row_id for row_id, row in rows.items())
    counted = sum(min(number, REPEATS) for number in copies.values())
    return sum(number == 1 for number in copies.values()) <= MOST_UNSEEN * counted
