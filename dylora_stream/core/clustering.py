"""Rows that no expert knows, gathered into clusters that may become skills.

Two rows are as similar as the cosine of their input features and of their answers' gradient sketches, averaged; rows
without a sketch are compared by input alone. Cosines are taken after centring on a *reference*, see `Reference`.

    place      one row: joins the cluster it is most like on average, or founds one; O(clusters)
    recluster  all waiting rows anew, by average linkage: splits and merges what the order of arrival got wrong
    readiness  whether a cluster may become an expert: distinct rows, cohesion, persistence

Only rows are kept here, no decisions about them: whoever owns the rows (the curator) says when one is taken or
expires. Nothing is drawn at random; the same rows in the same order give the same clusters and ids.

Invariant: a row is in exactly one cluster; a cluster has at least one row; an id is never given to another cluster
while its own has rows.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count

import numpy as np

from dylora_stream.core.linkage import average_linkage

__all__ = [
    "ClusteringConfig",
    "OnlineClusters",
    "Placement",
    "Readiness",
    "Reclustered",
    "Reference",
]

SAME_ROW = 1.0 - 1e-5  # similarity of copies of one text: bfloat16 moves features between batches
GROWTH = 1.1  # the reference is taken anew when this many times the rows were seen
TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteringConfig:
    """How waiting rows are gathered."""

    join_similarity: float = 0.15
    """Average similarity from which a row joins a cluster, and two clusters are one: a cosine, in (0, 1). Arriving one
    after another, the demo's first skill is ready after 79 records at 0.15 and 175 at 0.17; from 0.3 on loose skills
    stay in pieces."""

    max_gap: float = 0.3
    """How much less alike than each by itself two groups of rows may be and still be one cluster, above 0. At
    0.4 log systems run together (purity 0.3-0.5), at 0.2 systems of several templates stay in pieces."""

    answer_weight: float = 0.5
    """The answer sketch's part in the similarity of two rows that both have one, in [0, 1]."""

    reference_rows: int = 64
    """How many rows the prior reference counts for against the rows seen. More: a lone first skill is one piece sooner;
    fewer: skills of one genre that come at the same time are told apart better."""

    min_cohesion: float = 0.1
    """Average similarity within a cluster that may become an expert."""

    min_span_ms: int = 0
    """Record time between a ready cluster's first and last row. Above 0 it keeps a flood from becoming an expert."""

    def __post_init__(self) -> None:
        if not 0 < self.join_similarity < 1:
            raise ValueError(f"join_similarity must lie between 0 and 1, not {self.join_similarity}")
        if not self.max_gap > 0:
            raise ValueError(f"max_gap must be above 0, not {self.max_gap}")
        if not 0 <= self.answer_weight <= 1:
            raise ValueError(f"answer_weight must lie in [0, 1], not {self.answer_weight}")
        if self.reference_rows < 0 or self.min_span_ms < 0:
            raise ValueError("reference_rows and min_span_ms must not be negative")
        if not 0 <= self.min_cohesion < 1:
            raise ValueError(f"min_cohesion must lie in [0, 1), not {self.min_cohesion}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a row went. `merged`: (from, into) of clusters that became one by it."""

    cluster_id: str
    created: bool
    merged: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclustered:
    """What a pass changed: each moved row's new cluster, clusters that are new, and (from, into) of those that
    ended."""

    moves: Mapping[str, str] = field(default_factory=dict)
    created: tuple[str, ...] = ()
    merged: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether a cluster may become an expert; `reason` is a short snake_case class: ready, or what is missing."""

    is_ready: bool
    reason: str
    distinct_rows: int
    cohesion: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What rows are centred on before they are compared: without it all texts look alike, cosines of 0.9 between
    skills.

    input_mean, input_std: (d,); sketch_mean: (s,) or None.
    """

    input_mean: np.ndarray
    input_std: np.ndarray
    sketch_mean: np.ndarray | None = None

    def inputs(self, features: np.ndarray) -> np.ndarray:
        """Unit vectors (n, d) float32 of features (n, d)."""
        return _units((features - self.input_mean) / self.input_std)

    def sketches(self, sketches: np.ndarray) -> np.ndarray:
        """Unit vectors (n, s) float32 of sketches (n, s); rows of zeros stay zeros."""
        if not sketches.shape[1]:
            return sketches
        has_sketch = sketches.any(axis=1, keepdims=True)
        centred = sketches if self.sketch_mean is None else sketches - self.sketch_mean
        return _units(np.where(has_sketch, centred, 0.0))


class _Running:
    """Count, mean and variance of vectors, dimension by dimension, float64."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray = np.zeros(0)
        self._squares: np.ndarray = np.zeros(0)

    def add(self, vector: np.ndarray) -> None:
        exact = vector.astype(np.float64)
        if self.count == 0:
            self._mean, self._squares = np.zeros_like(exact), np.zeros_like(exact)
        self.count += 1
        before = exact - self._mean
        self._mean = self._mean + before / self.count
        self._squares = self._squares + before * (exact - self._mean)

    def blended(self, mean: np.ndarray, variance: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of these vectors and `weight` prior ones together."""
        if self.count == 0:
            return mean, variance
        share = weight / (weight + self.count)
        shift = self._mean - mean
        within = share * variance + (1.0 - share) * self._squares / self.count
        return mean + (1.0 - share) * shift, within + share * (1.0 - share) * shift**2


class OnlineClusters:
    """The waiting rows of one tenant, by cluster."""

    def __init__(self, config: ClusteringConfig, prior: Reference | None = None) -> None:
        self._config, self._prior = config, prior
        self._seen, self._seen_sketches = _Running(), _Running()
        self._counted: set[str] = set()
        self._slots: dict[str, int] = {}  # row id → its line in the arrays below, in order of arrival
        self._clusters: list[str] = []
        self._times = np.zeros(0, dtype=np.int64)
        self._features = np.zeros((0, 0), dtype=np.float32)
        self._sketches = np.zeros((0, 0), dtype=np.float32)  # zeros where a row has none
        self._inputs = self._answers = np.zeros(
            (0, 0), dtype=np.float32
        )  # unit vectors under the reference in force
        self._in_force: Reference | None = None
        self._centred_at = 0  # rows seen when the reference was last taken

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def clusters(self) -> dict[str, tuple[str, ...]]:
        """Every cluster's rows, both in order of arrival."""
        result: dict[str, list[str]] = {}
        for row_id, slot in self._slots.items():
            result.setdefault(self._clusters[slot], []).append(row_id)
        return {cluster_id: tuple(rows) for cluster_id, rows in result.items()}

    def place(self, row_id: str, features: np.ndarray, sketch: np.ndarray | None, time_ms: int) -> Placement:
        """Take a row in: features (d,), sketch (s,) or None. A row that is here already stays where it is."""
        if row_id in self._slots:
            return Placement(cluster_id=self._clusters[self._slots[row_id]], created=False)
        known = self.clusters
        self._append(row_id, features, sketch, time_ms, "")
        cluster_id, likeness = self._most_alike(len(self._slots) - 1)
        created = cluster_id is None or likeness < self._config.join_similarity
        home = _new_id([row_id], known) if cluster_id is None or created else cluster_id
        self._clusters[-1] = home
        return Placement(cluster_id=home, created=created)

    def restore(
        self, row_id: str, features: np.ndarray, sketch: np.ndarray | None, time_ms: int, cluster_id: str
    ) -> None:
        """Take back a stored row that was placed in an earlier run; in the order in which rows were placed."""
        self._append(row_id, features, sketch, time_ms, cluster_id)

    def recluster(self) -> Reclustered:
        """All rows anew, by average linkage. Clusters keep the id with which they share most rows."""
        if not self._slots:
            return Reclustered()
        self._centre()
        similarity = self._similarity(np.arange(len(self._slots)))
        labels = average_linkage(similarity, self._config.join_similarity, max_gap=self._config.max_gap)
        ids, before = list(self._slots), list(self._clusters)
        names = _names(labels, before, ids)
        self._clusters = [names[label] for label in labels.tolist()]
        moves = {row: new for row, old, new in zip(ids, before, self._clusters, strict=True) if old != new}
        ended = set(before) - set(self._clusters)
        merged = tuple((old, _heir(old, before, self._clusters)) for old in sorted(ended))
        return Reclustered(
            moves=moves, created=tuple(sorted(set(self._clusters) - set(before))), merged=merged
        )

    def members(self, cluster_id: str) -> tuple[str, ...]:
        """Row ids in order of arrival."""
        return tuple(row_id for row_id, slot in self._slots.items() if self._clusters[slot] == cluster_id)

    def cohesion(self, cluster_id: str) -> float:
        """Average similarity of two of its rows, 1.0 for a single row."""
        slots = self._slots_of(cluster_id)
        if len(slots) < 2:
            return 1.0
        similarity = self._similarity(slots)[:, slots]
        return float((similarity.sum() - np.trace(similarity)) / (len(slots) * (len(slots) - 1)))

    def readiness(self, cluster_id: str, min_rows: int) -> Readiness:
        """Whether the cluster may become an expert. Repeats of one text count once; a flood has no span."""
        slots = self._slots_of(cluster_id)
        distinct, cohesion = self._distinct(slots), self.cohesion(cluster_id)
        span_ms = int(np.ptp(self._times[slots])) if len(slots) else 0
        if distinct < min_rows:
            reason = "repeats" if len(slots) >= min_rows else "too_few_rows"
        elif cohesion < self._config.min_cohesion:
            reason = "scattered"
        elif span_ms < self._config.min_span_ms:
            reason = "flood"
        else:
            reason = "ready"
        return Readiness(is_ready=reason == "ready", reason=reason, distinct_rows=distinct, cohesion=cohesion)

    def forget(self, row_ids: Iterable[str]) -> None:
        """Rows that an expert took, or that expired; unknown ones are ignored."""
        gone = {row_id for row_id in row_ids if row_id in self._slots}
        if not gone:
            return
        kept = [row_id for row_id in self._slots if row_id not in gone]
        lines = np.array([self._slots[row_id] for row_id in kept], dtype=np.int64)
        self._clusters = [self._clusters[line] for line in lines.tolist()]
        self._times, self._features, self._sketches = (
            self._times[lines],
            self._features[lines],
            self._sketches[lines],
        )
        self._inputs, self._answers = self._inputs[lines], self._answers[lines]
        self._slots = {row_id: slot for slot, row_id in enumerate(kept)}

    def expired(self, before_ms: int) -> tuple[str, ...]:
        """Rows of clusters that had no row since that record time: to be forgotten by whoever owns them."""
        latest: dict[str, int] = {}
        for cluster_id, time_ms in zip(self._clusters, self._times.tolist(), strict=True):
            latest[cluster_id] = max(latest.get(cluster_id, time_ms), time_ms)
        return tuple(
            row_id for row_id, slot in self._slots.items() if latest[self._clusters[slot]] < before_ms
        )

    # --- arrays ---------------------------------------------------------------------------------------------------

    def _append(
        self, row_id: str, features: np.ndarray, sketch: np.ndarray | None, time_ms: int, cluster_id: str
    ) -> None:
        if row_id not in self._counted:  # a row that comes back from a training that failed counts once
            self._counted.add(row_id)
            self._seen.add(features)
            if sketch is not None:
                self._seen_sketches.add(sketch)
        width, line = self._sketches.shape[1], np.zeros(0, dtype=np.float32) if sketch is None else sketch
        self._slots[row_id] = len(self._clusters)
        self._clusters.append(cluster_id)
        self._times = np.append(self._times, np.int64(time_ms))
        self._features = _stacked(self._features, features)
        self._sketches = _stacked(self._sketches, line)
        if (
            self._in_force is None
            or self._seen.count > GROWTH * self._centred_at
            or self._sketches.shape[1] != width
        ):
            self._centre()
        else:
            self._inputs = _stacked(self._inputs, self._in_force.inputs(features[None])[0])
            self._answers = _stacked(self._answers, self._in_force.sketches(self._sketches[-1:])[0])

    def _centre(self) -> None:
        """Take the reference anew: the prior, blended with the rows seen."""
        self._centred_at = self._seen.count
        self._in_force = self._blend()
        self._inputs = self._in_force.inputs(self._features)
        self._answers = self._in_force.sketches(self._sketches)

    def _blend(self) -> Reference:
        prior, weight = self._prior, float(self._config.reference_rows)
        if prior is None:
            zeros = np.zeros(self._features.shape[1])
            prior, weight = Reference(input_mean=zeros, input_std=zeros + 1.0), 0.0
        mean, variance = self._seen.blended(prior.input_mean, prior.input_std**2, weight)
        sketch_mean = prior.sketch_mean
        if self._seen_sketches.count:
            start = np.zeros(self._sketches.shape[1]) if sketch_mean is None else sketch_mean
            sketch_mean, _ = self._seen_sketches.blended(start, start * 0.0, weight)
        return Reference(input_mean=mean, input_std=np.sqrt(variance) + TINY, sketch_mean=sketch_mean)

    def _similarity(self, slots: np.ndarray) -> np.ndarray:
        """(len(slots), n) float32 of these rows to all."""
        inputs = self._inputs[slots] @ self._inputs.T
        if not self._answers.shape[1]:
            return np.asarray(inputs)
        has_answer = np.asarray(self._sketches.any(axis=1), dtype=np.float32)
        weight = self._config.answer_weight * np.outer(has_answer[slots], has_answer)
        answers = self._answers[slots] @ self._answers.T
        similarity: np.ndarray = (1.0 - weight) * inputs + weight * answers
        return similarity.astype(np.float32)

    def _most_alike(self, slot: int) -> tuple[str | None, float]:
        """The cluster that this row is most like on average, itself aside, and how much."""
        names = sorted(set(self._clusters) - {""})
        if not names:
            return None, 0.0
        index = {name: number for number, name in enumerate(names)}
        owners = np.array([index.get(name, len(names)) for name in self._clusters])
        similarity = self._similarity(np.array([slot]))[0]
        sums = np.bincount(owners, similarity, minlength=len(names) + 1)[: len(names)]
        means = sums / np.bincount(owners, minlength=len(names) + 1)[: len(names)]
        best = int(means.argmax())
        return names[best], float(means[best])

    def _slots_of(self, cluster_id: str) -> np.ndarray:
        return np.array(
            [slot for slot, name in enumerate(self._clusters) if name == cluster_id], dtype=np.int64
        )

    def _distinct(self, slots: np.ndarray) -> int:
        """How many of these rows have no earlier twin among them."""
        if not len(slots):
            return 0
        similarity = np.tril(self._similarity(slots)[:, slots], -1)
        return len(slots) - int((similarity.max(axis=1) >= SAME_ROW).sum())


def _names(labels: np.ndarray, before: Sequence[str], row_ids: Sequence[str]) -> dict[int, str]:
    """A cluster id for each label: the old one of largest overlap, each given once; else a new one."""
    overlaps: dict[tuple[int, str], int] = {}
    for label, old in zip(labels.tolist(), before, strict=True):
        overlaps[label, old] = overlaps.get((label, old), 0) + 1
    names: dict[int, str] = {}
    for (label, old), _ in sorted(overlaps.items(), key=lambda item: (-item[1], item[0])):
        if label not in names and old not in names.values():
            names[label] = old
    for label in sorted(set(labels.tolist()) - set(names)):
        rows = [row_id for row_id, other in zip(row_ids, labels.tolist(), strict=True) if other == label]
        names[label] = _new_id(rows, {*before, *names.values()})
    return names


def _heir(ended: str, before: Sequence[str], after: Sequence[str]) -> str:
    """The cluster that has most rows of one that ended."""
    heirs = [new for old, new in zip(before, after, strict=True) if old == ended]
    return max(sorted(set(heirs)), key=heirs.count)


def _new_id(row_ids: Sequence[str], taken: Iterable[str]) -> str:
    """An id made from the founding row, so that a replay gives the same; from a later row where that one is taken."""
    used = set(taken)
    texts = chain(row_ids, (f"{row_ids[0]}#{number}" for number in count()))
    names = ("c-" + hashlib.blake2b(text.encode(), digest_size=5).hexdigest() for text in texts)
    return next(name for name in names if name not in used)


def _units(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) brought to length 1, float32; zeros stay."""
    return np.asarray(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + TINY), dtype=np.float32)


def _stacked(table: np.ndarray, line: np.ndarray) -> np.ndarray:
    """The table (n, d) with one line (d,) more; the narrower of the two is filled up with zeros."""
    width = max(table.shape[1], len(line))
    grown = np.zeros((len(table) + 1, width), dtype=np.float32)
    grown[:-1, : table.shape[1]], grown[-1, : len(line)] = table, line
    return grown
