"""The one thing worth a child process now: sketches, then a full buffer, then an expert with new rows.

On a stream that brings new rows faster than they are sketched there are always some to sketch. So a full buffer comes
before the second sketch job in a row, and an expert with new rows after a few; experts take turns.

Nothing is changed here but the memory of what came to nothing. A job that failed (a full disk, a child that was killed)
says nothing about its rows: its cluster or expert rests for a while, longer after each failure, and it is tried again;
rows to be sketched with fewer at once (`learn.sketching`). An expert whose new version was rejected waits for twice as
many new rows, in the end for as many as one job takes, all of them rows that the last attempt did not have.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dylora_stream.core.experts import Registry
from dylora_stream.core.ledger import ClusterRecord, ClusterState, JobKind, JobRecord, LedgerRow, RowState
from dylora_stream.core.ports import Clock
from dylora_stream.learn.buffers import Buffers
from dylora_stream.learn.lifecycle import BackOff, LifecycleConfig, newest_distinct
from dylora_stream.learn.sketching import Sketching

__all__ = ["Agenda", "JobRequest"]

SKETCHES_IN_A_ROW = 4  # before an expert with new rows is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A job worth doing now."""

    kind: JobKind
    tenant: str
    rows: tuple[LedgerRow, ...]
    cluster_id: str | None = None
    expert_id: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many records at hand have each row's text; one where it is not named."""


@dataclass(frozen=True, slots=True)
class _InVain:
    """Attempts to consolidate an expert that came to nothing, and the rows of the last one."""

    attempts: int = 0
    positions: frozenset[str] = frozenset()


class Agenda:
    """What is to be done next, by the state of the buffers and the experts."""

    def __init__(self, buffers: Buffers, rules: LifecycleConfig, clock: Clock, slots: int) -> None:
        """slots: experts that serve can have live; one more would be trained for nobody."""
        self._buffers, self._slots = buffers, slots
        self._rules = rules
        self._clock = clock
        self._sketching = Sketching(rules, clock)
        self._resting: dict[str, BackOff] = {}  # clusters and experts whose last job failed
        self._in_vain: dict[str, _InVain] = {}  # by expert, since its last new version
        self._sketched = 0  # sketch jobs since another one ended
        self._consolidated: dict[str, None] = {}  # experts that had a job, the one that waits longest first

    def next(self, registry: Registry) -> JobRequest | None:
        """The most useful job, or None."""
        job = self._seed_job(registry) if self._sketched else None
        if job is None and self._sketched >= SKETCHES_IN_A_ROW:
            job = self._consolidation_job(registry)
        return job or self._sketch_job() or self._seed_job(registry) or self._consolidation_job(registry)

    def held_back(self, registry: Registry) -> list[ClusterRecord]:
        """Clusters that would be experts, were there a place in the pool."""
        return self._ready() if self._is_full(registry) else []

    def done(self, job: JobRecord) -> None:
        """The job gave what it was asked for: sketches, or a decision."""
        self._take_turns(job)
        if job.kind is JobKind.SKETCH:
            self._sketching.done(job)
        self._resting.pop(_whose(job), None)

    def failed(self, job: JobRecord) -> str | None:
        """The job gave nothing; the position of the row that is to be given up for it, if it is one."""
        self._take_turns(job)
        if job.kind is JobKind.SKETCH:
            return self._sketching.failed(job)
        self._resting.setdefault(_whose(job), BackOff()).failed(self._clock.now_ms())
        return None

    def was_in_vain(self, job: JobRecord) -> None:
        """An expert's new version was rejected."""
        before = self._in_vain.get(job.expert_id or "", _InVain())
        self._in_vain[job.expert_id or ""] = _InVain(before.attempts + 1, frozenset(job.positions))

    def has_new_version(self, expert_id: str) -> None:
        """What was in vain before is forgotten."""
        self._in_vain.pop(expert_id, None)

    def _take_turns(self, job: JobRecord) -> None:
        """Whoever had a job is asked last."""
        self._sketched = self._sketched + 1 if job.kind is JobKind.SKETCH else 0
        if job.kind is JobKind.CONSOLIDATE:
            self._consolidated.pop(job.expert_id or "", None)
            self._consolidated[job.expert_id or ""] = None

    def _sketch_job(self) -> JobRequest | None:
        rows = self._sketching.next(self._buffers.rows.in_state(RowState.WAITING))
        return JobRequest(kind=JobKind.SKETCH, tenant=rows[0].tenant, rows=rows) if rows else None

    def _is_full(self, registry: Registry) -> bool:
        return len(registry.experts) >= self._slots

    def _ready(self) -> list[ClusterRecord]:
        """Open clusters whose buffers are full."""
        clusters = self._buffers.clusters.values()
        return [each for each in clusters if each.state is ClusterState.OPEN and self._buffers.is_ready(each)]

    def _seed_job(self, registry: Registry) -> JobRequest | None:
        for cluster in [] if self._is_full(registry) else self._ready():
            members = self._buffers.members(cluster.cluster_id)
            rows = newest_distinct(members, self._rules.max_seed_rows)
            if rows and not self._rests(cluster.cluster_id):
                named = {"tenant": cluster.tenant, "cluster_id": cluster.cluster_id}
                counts = Counter(row.input for row in members)
                return JobRequest(kind=JobKind.SEED, rows=tuple(rows), counts=counts, **named)
        return None

    def _consolidation_job(self, registry: Registry) -> JobRequest | None:
        if not self._is_full(registry) and self._is_filling():  # what nobody knows yet comes first
            return None
        turns = {expert_id: place for place, expert_id in enumerate(self._consolidated)}
        for version in sorted(registry.experts, key=lambda version: turns.get(version.expert_id, -1)):
            owned = self._buffers.rows.of_expert(version.expert_id)
            rows = newest_distinct(owned, self._rules.max_consolidate_rows)
            if self._is_due(version.expert_id, rows) and not self._rests(version.expert_id):
                named = {"tenant": version.tenant, "expert_id": version.expert_id}
                counts = Counter(row.input for row in owned)
                return JobRequest(kind=JobKind.CONSOLIDATE, rows=tuple(rows), counts=counts, **named)
        return None

    def _rests(self, name: str) -> bool:
        """Whether the last job of this cluster or expert failed, not long ago."""
        return name in self._resting and self._clock.now_ms() < self._resting[name].until_ms

    def _is_filling(self) -> bool:
        """Whether a buffer has a good part of its rows and still gets new ones, so that its job will come soon.

        One that has all its rows and is not ready (a flood, one text, scattered rows) may never be: it holds up nobody.
        """
        since_ms = self._clock.now_ms() - 1000 * self._rules.filling_s
        for cluster in self._buffers.clusters.values():
            if cluster.state is not ClusterState.OPEN or self._rests(cluster.cluster_id):
                continue
            members = self._buffers.members(cluster.cluster_id)
            is_partly_full = cluster.rows_wanted <= 4 * len(members) < 4 * cluster.rows_wanted
            if is_partly_full and members[-1].time_ms >= since_ms:
                return True
        return False

    def _is_due(self, expert_id: str, rows: Sequence[LedgerRow]) -> bool:
        """Whether there are new rows enough: as many again as all attempts that came to nothing have had, and no more
        than a job takes."""
        in_vain = self._in_vain.get(expert_id, _InVain())
        wanted = self._rules.rows_to_consolidate << max(in_vain.attempts - 1, 0)
        new = sum(not row.is_trained and row.position not in in_vain.positions for row in rows)
        return new >= min(wanted, self._rules.max_consolidate_rows)


def _whose(job: JobRecord) -> str:
    """The cluster that a job seeds from, or the expert that it trains on."""
    return job.cluster_id or job.expert_id or ""
