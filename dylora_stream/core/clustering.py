"""Rows that no expert knows, gathered into clusters that may become skills.

Two rows are as similar as the cosine of the leading block of their input features and of their answers' gradient
sketches, averaged; rows without a sketch are compared by input alone. Cosines are taken after centring on the rows of
experts and clusters together with a *reference*, see `Reference`; never above what they are on the reference alone, so
that strings of nothing in particular are not alike. What one source sends is often a few templates that look nothing
alike, so groups of alike rows are then merged by whether they come together as well, see `core.regrouping` and
`core.arrivals`.

    place      one row: joins the cluster it is most like on average, or founds one; O(compared rows)
    recluster  all waiting rows anew: tight groups, merged with one another or into the expert that they came with
    witness    a row that an expert has: what clusters are told apart from, and may join
    dismiss    an expert that is gone
    readiness  whether a cluster may become an expert: distinct rows, cohesion, persistence

Only rows are kept here, no decisions about them: whoever owns the rows (the curator) says when one is taken or
expires. Nothing is drawn at random; the same rows in the same order give the same clusters and ids.

Repeats of a text stand behind their first row. The newest `COMPARED` first rows are compared; older ones stay with
their cluster. Features are kept by reference; a compared row costs two copies of its leading blocks (4.4 KB at
576 + 512 numbers), any other one some 400 bytes beside the caller's own array.

Invariant: a row is in exactly one cluster; a cluster has at least one row; an id that is in use, here or with the
caller, is never given to another cluster.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dylora_stream.core.arrivals import Timeline
from dylora_stream.core.cluster_config import ClusteringConfig
from dylora_stream.core.cluster_names import cluster_names, digest, heir, new_id
from dylora_stream.core.likeness import (
    Reference,
    Table,
    WaitingRow,
    blended,
    features_of,
    similarity,
    sketches_of,
)
from dylora_stream.core.linkage import MergeRules
from dylora_stream.core.readiness import Candidate, Cohesion, Readiness, cohesion_of, newest_firsts, readiness
from dylora_stream.core.regrouping import Scene, regroup

__all__ = ["OnlineClusters", "Placement", "Reclustered", "Reference"]

SAME_ROW = 1.0 - 1e-5  # similarity of copies of one text: bfloat16 moves features between batches
GROWTH = 1.1  # the reference is taken anew when this many times the rows were seen
COMPARED = 2048  # first rows that a pass compares; their similarities take 16 MB
RESIDENTS = 48  # rows of an expert that stand for it, fewer where experts are many


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a row went, and whether that cluster is new."""

    cluster_id: str
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclustered:
    """What a pass changed: each moved row's new cluster, clusters that are new, and (from, into) of those that
    ended. `joined`: rows that belong to an expert, and to which; they are in no cluster any more."""

    moves: Mapping[str, str] = field(default_factory=dict)
    created: tuple[str, ...] = ()
    merged: tuple[tuple[str, str], ...] = ()
    joined: Mapping[str, str] = field(default_factory=dict)


class OnlineClusters:
    """The waiting rows of one tenant, by cluster, and what stands for its experts."""

    def __init__(
        self, config: ClusteringConfig, prior: Reference | None = None, used: Collection[str] = ()
    ) -> None:
        """`used`: cluster ids that a new cluster must not get, read whenever one is founded."""
        self._config, self._prior, self._used = config, prior, used
        self._rules = MergeRules(config.join_similarity, config.kinship, config.together)
        self._rows: dict[str, WaitingRow] = {}  # in order of arrival
        self._compared: list[str] = []  # row ids of the lines of the tables below
        self._inputs = self._answers = Table(np.zeros((0, 0), dtype=np.float32))
        self._centre: Reference | None = None
        self._centred_at = 0  # rows in play when the reference was last taken
        self._residents: dict[str, dict[str, WaitingRow]] = {}
        self._timeline = Timeline()
        self._is_stale = True  # the tables do not show the rows that there are
        self._measured: dict[
            str, tuple[tuple[str, ...], Cohesion]
        ] = {}  # by cluster: of which rows, how alike
        self._doubtful: frozenset[str] = frozenset()  # clusters that might be an expert's: time has not told

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def clusters(self) -> dict[str, tuple[str, ...]]:
        """Every cluster's rows, both in order of arrival."""
        result: dict[str, list[str]] = {}
        for row_id, row in self._rows.items():
            result.setdefault(row.cluster_id, []).append(row_id)
        return {cluster_id: tuple(rows) for cluster_id, rows in result.items()}

    def place(self, row_id: str, features: np.ndarray, sketch: np.ndarray | None, time_ms: int) -> Placement:
        """Take a row in: features (d,), sketch (s,) or None. A row that is here already stays where it is."""
        if row_id in self._rows:
            return Placement(cluster_id=self._rows[row_id].cluster_id, created=False)
        row, likenesses = self._append(row_id, features, sketch, time_ms)
        home = self._rows[row.twin].cluster_id if row.twin else self._most_alike(likenesses)
        row.cluster_id = home or new_id([row_id], {*self._used, *self.clusters})
        return Placement(cluster_id=row.cluster_id, created=home is None)

    def restore(
        self, row_id: str, features: np.ndarray, sketch: np.ndarray | None, time_ms: int, cluster_id: str
    ) -> None:
        """Take back a stored row that was placed in an earlier run; in the order in which rows were placed."""
        self._append(row_id, features, sketch, time_ms, cluster_id)

    def witness(
        self, row_id: str, features: np.ndarray, sketch: np.ndarray | None, time_ms: int, owner: str
    ) -> None:
        """A row that an expert has, waiting here or not. In any order; said again, it changes nothing."""
        self.forget([row_id])
        self._timeline.note(row_id, time_ms, owner)
        residents = self._residents.setdefault(owner, {})
        residents[row_id] = WaitingRow.of(features, sketch, time_ms, owner)
        if len(residents) > RESIDENTS:
            del residents[max(residents, key=digest)]

    def dismiss(self, owner: str) -> None:
        """An expert is gone: nothing is told apart from its rows any more, and nothing joins it."""
        if self._residents.pop(owner, None) is not None:
            self._is_stale = True

    def recluster(self) -> Reclustered:
        """All rows anew. Clusters keep the id with which they share most rows."""
        if not self._rows:
            return Reclustered()
        self._recentre()
        result = regroup(self._scene(), self._config.tight_similarity, self._rules)
        ids = [row_id for row_id in self._rows if row_id not in result.joined]
        labels, before = (
            [result.labels[row_id] for row_id in ids],
            [self._rows[row_id].cluster_id for row_id in ids],
        )
        names = cluster_names(labels, before, ids, self._used)
        after = [names[label] for label in labels]
        for row_id, name in zip(ids, after, strict=True):
            self._rows[row_id].cluster_id = name
        self._doubtful = frozenset(names[label] for label in result.doubtful if label in names)
        for row_id, owner in result.joined.items():
            row = self._rows[row_id]
            self.witness(row_id, row.features, row.sketch, row.time_ms, owner)
        return Reclustered(
            moves={row: new for row, old, new in zip(ids, before, after, strict=True) if old != new},
            created=tuple(sorted(set(after) - set(before))),
            merged=tuple((name, heir(name, before, after)) for name in sorted(set(before) - set(after))),
            joined=result.joined,
        )

    def members(self, cluster_id: str) -> tuple[str, ...]:
        """Row ids in order of arrival."""
        return tuple(row_id for row_id, row in self._rows.items() if row.cluster_id == cluster_id)

    def readiness(self, cluster_id: str, min_rows: int) -> Readiness:
        """Whether the cluster may become an expert, see `core.readiness`."""
        rows = {row_id: self._rows[row_id] for row_id in self.members(cluster_id)}
        candidate = Candidate(
            rows=rows,
            cohesion=self._cohesion(cluster_id, rows),
            interval_ms=self._timeline.interval_ms(),
            is_doubtful=cluster_id in self._doubtful,
        )
        return readiness(candidate, min_rows, self._config)

    def forget(self, row_ids: Iterable[str]) -> None:
        """Rows that an expert took, or that expired; unknown ones are ignored. A repeat takes its first row's place."""
        gone = {row_id for row_id in row_ids if self._rows.pop(row_id, None) is not None}
        if not gone:
            return
        heirs: dict[str, str] = {}
        for row_id, row in self._rows.items():
            if row.twin is not None and row.twin in gone:
                heir = heirs.setdefault(row.twin, row_id)
                row.twin = None if heir == row_id else heir
        self._is_stale = True

    def expired(self, before_ms: int) -> tuple[str, ...]:
        """Rows of clusters that had no row since that record time: to be forgotten by whoever owns them."""
        latest: dict[str, int] = {}
        for row in self._rows.values():
            latest[row.cluster_id] = max(latest.get(row.cluster_id, row.time_ms), row.time_ms)
        return tuple(row_id for row_id, row in self._rows.items() if latest[row.cluster_id] < before_ms)

    # --- one row --------------------------------------------------------------------------------------------------

    def _append(
        self, row_id: str, features: np.ndarray, sketch: np.ndarray | None, time_ms: int, cluster_id: str = ""
    ) -> tuple[WaitingRow, np.ndarray]:
        """The row, its twin found, and its similarity (n,) to the rows that are compared."""
        row = WaitingRow.of(features, sketch, time_ms, cluster_id)
        self._rows[row_id] = row
        self._timeline.note(row_id, time_ms)
        if self._is_stale or len(self._compared) > GROWTH * self._centred_at:
            self._recentre(without=row_id)
        likenesses = self._likenesses(row)
        if len(likenesses) and likenesses.max() >= SAME_ROW:
            row.twin = self._compared[int(likenesses.argmax())]
        else:
            self._compare(row_id, row)
        return row, likenesses

    def _likenesses(self, row: WaitingRow) -> np.ndarray:
        if not self._compared or self._centre is None:
            return np.zeros(0, dtype=np.float32)
        inputs = self._inputs.rows @ self._centre.inputs(row.features[None])[0]
        if row.sketch is None or not self._answers.rows.shape[1]:
            return np.asarray(inputs)
        answers = self._answers.rows
        weight = self._config.answer_weight * answers.any(axis=1)
        return np.asarray(
            (1.0 - weight) * inputs + weight * (answers @ self._centre.sketches(row.sketch[None])[0])
        )

    def _compare(self, row_id: str, row: WaitingRow) -> None:
        """The row is compared with those to come."""
        width = self._answers.rows.shape[1]
        if self._centre is None or not self._compared or (row.sketch is not None and not width):
            self._recentre()
            return
        self._compared.append(row_id)
        self._inputs.append(self._centre.inputs(row.features[None])[0])
        none = np.zeros(width, dtype=np.float32)
        self._answers.append(none if row.sketch is None else self._centre.sketches(row.sketch[None])[0])

    def _most_alike(self, likenesses: np.ndarray) -> str | None:
        """The cluster that a row of these similarities is most like on average, if enough."""
        owners = [self._rows[row_id].cluster_id for row_id in self._compared[: len(likenesses)]]
        names, index = np.unique(owners, return_inverse=True) if owners else (np.zeros(0), np.zeros(0, int))
        if not len(names):
            return None
        means = np.bincount(index, likenesses) / np.bincount(index)
        best = int(means.argmax())
        return str(names[best]) if means[best] >= self._config.join_similarity else None

    # --- all rows -------------------------------------------------------------------------------------------------

    def _recentre(self, without: str | None = None) -> None:
        """Take the reference anew, and with it the tables of compared rows: the newest first rows."""
        firsts = [row_id for row_id, row in self._rows.items() if row.twin is None and row_id != without]
        self._is_stale = False
        self._measured.clear()
        self._compared, self._centred_at = firsts[-COMPARED:], min(len(firsts), COMPARED)
        rows = [self._rows[row_id] for row_id in self._compared]
        owners = sorted(self._residents)
        residents = [
            self._residents[owner][key] for owner in owners for key in sorted(self._residents[owner])
        ]
        if not rows and not residents:
            self._centre = None
            return
        interval = self._timeline.interval_ms()
        everyone = rows + residents
        # What was never seen counts as half an expert at least: a lone skill would be the middle it is measured from.
        prior_rows = max(self._config.reference_rows, len(everyone) / (2 * len(owners) + 2))
        self._centre = blended(everyone, self._prior, prior_rows, interval)
        if rows:
            self._inputs = Table(self._centre.inputs(features_of(rows)))
            self._answers = Table(self._centre.sketches(sketches_of(rows)))

    def _similarity(self, rows: Sequence[WaitingRow]) -> np.ndarray:
        """(n, n) float32 under the reference in force."""
        interval = self._timeline.interval_ms()
        centre = self._centre or blended(rows, self._prior, self._config.reference_rows, interval)
        return similarity(rows, centre, self._prior, self._config.answer_weight)

    def _cohesion(self, cluster_id: str, rows: Mapping[str, WaitingRow]) -> Cohesion:
        """Measured anew only where its newest rows or the reference have changed: a full cluster that is not ready is
        asked about several times a second, for days."""
        firsts = newest_firsts(rows)
        row_ids, cohesion = self._measured.get(cluster_id, ((), Cohesion(1.0, 1.0)))
        if row_ids != tuple(firsts):
            cohesion = cohesion_of(self._similarity(list(firsts.values())))
            self._measured[cluster_id] = (tuple(firsts), cohesion)
        return cohesion

    def _scene(self) -> Scene:
        """The compared rows beside what stands for the experts."""
        owners = sorted(self._residents)
        most = max(RESIDENTS // 6, min(RESIDENTS, COMPARED // max(len(owners), 1)))
        standing = [
            (number, self._residents[owner][row_id])
            for number, owner in enumerate(owners)
            for row_id in sorted(self._residents[owner], key=digest)[:most]
        ]
        rows = [self._rows[row_id] for row_id in self._compared] + [row for _, row in standing]
        return Scene(
            rows=self._rows,
            compared=self._compared,
            similarity=self._similarity(rows),
            owners=owners,
            standing=[number for number, _ in standing],
            timeline=self._timeline,
        )
