"""Decides what becomes of every sample: known, waiting, clustered, trained on. Pure but for its own memory.

    take       samples and late answers: a row an expert knows is that expert's; a new one waits for its sketch
    next_job   the one thing worth a child now, see `learn.agenda`
    finish     what a child brought back: sketches are clustered; an expert goes live, or its cluster backs off
    retire     an expert that an operator takes out

Each returns `Changes`, to be committed before anything of it is told to anyone; the curator's memory moves with
them, so a curator whose commit failed must be thrown away (the process ends; the next one loads the ledger).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dylora_stream.core.cluster_config import ClusteringConfig
from dylora_stream.core.clustering import Reference
from dylora_stream.core.events import EventType, lifecycle_event
from dylora_stream.core.experts import Maturity, Registry
from dylora_stream.core.ledger import (
    Changes,
    ClusterRecord,
    ClusterState,
    JobKind,
    JobRecord,
    JobState,
    LedgerState,
    RowState,
)
from dylora_stream.core.messages import Feedback, Sample
from dylora_stream.core.ports import Clock, Codec, Partition
from dylora_stream.learn.agenda import Agenda, JobRequest
from dylora_stream.learn.buffers import Buffers, Moved, row_of
from dylora_stream.learn.claims import claims
from dylora_stream.learn.knowledge import Knowledge
from dylora_stream.learn.late_answers import LateAnswers
from dylora_stream.learn.lifecycle import LifecycleConfig, TrackRecords
from dylora_stream.learn.retirement import put_aside, retirement
from dylora_stream.learn.rows import Rows, dated, is_another

__all__ = ["Curator", "CuratorConfig"]

UNCLAIMED = (RowState.WAITING, RowState.UNLABELLED, RowState.CLUSTERED)  # what a new expert may claim


@dataclass(frozen=True, slots=True, kw_only=True)
class CuratorConfig:
    """The rules that the curator follows."""

    lifecycle: LifecycleConfig
    clustering: ClusteringConfig
    slots: int = 32
    """Experts that serve can have live (`pool.slots`)."""


class Curator:
    """Learn's decisions, one owner a partition."""

    def __init__(
        self, state: LedgerState, knowledge: Knowledge, codec: Codec, clock: Clock, config: CuratorConfig
    ) -> None:
        self._codec = codec
        self._clock = clock
        self._rules = config.lifecycle
        self._knowledge = knowledge
        self.registry: Registry = state.registry
        self._buffers = Buffers(state, config.clustering, config.lifecycle)
        self.left_running, self.era = state.jobs, state.era  # as the process that stopped left them
        self.late = LateAnswers(state, self._buffers, clock, config.lifecycle.expire_after_ms)
        self._busy = {job.job_id: frozenset(job.positions) for job in state.jobs}  # rows of running jobs
        self._tracks = TrackRecords(state.rows)
        self._label_at: dict[str, int] = defaultdict(lambda: config.lifecycle.rows_to_seed)
        self._agenda = Agenda(self._buffers, config.lifecycle, clock, config.slots)
        self._told_held_back: set[str] = set()  # clusters of which it was said that the pool has no place
        knowledge.refresh(self.registry)

    def buffer_age_s(self) -> float:
        """Seconds since the oldest row that waits for an expert was sent; 0 without one."""
        return self._buffers.age_s(self._clock.now_ms())

    def summary(self) -> Mapping[str, Any]:
        """Counts for people, as `Ledger.summary` gives them."""
        return self._buffers.summary()

    # ── take ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(
        self, samples: Sequence[Sample], feedback: Sequence[Feedback], positions: Mapping[Partition, int]
    ) -> Changes:
        """New samples and late answers; `positions` is how far the topics were read."""
        changes = Changes(positions=dict(positions))
        timed = (dated(sample, self._clock.now_ms()) for sample in samples)
        taken = {str(sample.position): sample for sample in self.late.complete(timed, changes)}
        fresh = {position: sample for position, sample in taken.items() if position not in self._buffers.rows}
        tenants = sorted({sample.tenant for sample in fresh.values()})
        for tenant in tenants:
            self._sort([sample for sample in fresh.values() if sample.tenant == tenant], tenant, changes)
        self._ask_for_labels(tenants, changes)
        for late in feedback:
            labelled = self.late.take(late, self.registry, changes)
            if labelled is not None:
                self._tracks.add(labelled)
        for request, late, reason in self.late.give_up(changes):
            told = {"tenant": late.tenant, "reason": reason}
            self._tell(EventType.FEEDBACK_UNMATCHED, request, late.target, changes, told)
        self._promote_mature(changes)
        self._buffers.tidy(self._clock.now_ms(), frozenset().union(*self._busy.values()), changes)
        return changes

    @property
    def rows(self) -> Rows:
        """What is at hand."""
        return self._buffers.rows

    def knows_another(self, sample: Sample) -> bool:
        """Whether another record than this one is at hand under its position."""
        row = self._buffers.rows.get(str(sample.position))
        return row is not None and is_another(row, sample, self._clock.now_ms())

    def _sort(self, samples: list[Sample], tenant: str, changes: Changes) -> None:
        """Rows of one tenant to the expert that knows them, or to the waiting room; see `Knowledge.match`."""
        matches = self._knowledge.match(tenant, np.stack([sample.features for sample in samples]))
        served = {version.expert_id for version in self.registry.experts}
        for sample, match in zip(samples, matches, strict=True):
            row = row_of(sample)
            if sample.is_correct and sample.expert in served:
                row = replace(row, state=RowState.ASSIGNED, expert_id=sample.expert)
            elif self._knowledge.is_known(match) and sample.is_correct is not False:
                row = replace(row, state=RowState.ASSIGNED, expert_id=match.nearest)
            elif sample.output is None:
                row = replace(row, state=RowState.UNLABELLED)
            self._buffers.put(row, changes)
            self._tracks.add(row)

    def _ask_for_labels(self, tenants: Sequence[str], changes: Changes) -> None:
        """Said once a buffer's worth of new rows without a right answer has come, and at each doubling."""
        counts = Counter(row.tenant for row in self._buffers.rows.in_state(RowState.UNLABELLED))
        for tenant in tenants:
            rows = counts[tenant]
            if rows >= self._label_at[tenant]:
                self._label_at[tenant] = 2 * rows
                self._tell(EventType.CLUSTER_AWAITING_LABELS, tenant, str(rows), changes, {"rows": rows})

    def _promote_mature(self, changes: Changes) -> None:
        """Experts whose record is long and good enough take their rows alone from now on."""
        for version in self.registry.experts:
            track = self._tracks.of(version.expert_id)
            if version.maturity is not Maturity.NASCENT or not track.is_mature(self._rules):
                continue
            mature = replace(version, maturity=Maturity.MATURE)
            self._publish(self.registry.with_expert(mature), [mature.expert_id], changes)
            numbers = {"rows": track.rows, "accuracy": round(track.accuracy, 4), "version": version.version}
            self._tell(EventType.EXPERT_MATURED, version.expert_id, "matured", changes, numbers)
            moved = {"from": "dense", "to": "sparse", **numbers}
            self._tell(EventType.ROUTING_CHANGED, version.expert_id, "matured", changes, moved)

    # ── next_job ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_job(self) -> JobRequest | None:
        """The most useful job, or None."""
        return self._agenda.next(self.registry)

    def start(self, request: JobRequest, job_id: str) -> Changes:
        """The job is about to be submitted."""
        changes = Changes()
        served = self.registry.expert(request.expert_id) if request.expert_id else None
        job = JobRecord(
            job_id=job_id,
            kind=request.kind,
            tenant=request.tenant,
            created_ms=self._clock.now_ms(),
            positions=tuple(row.position for row in request.rows),
            cluster_id=request.cluster_id,
            expert_id=request.expert_id or (f"e-{job_id[:8]}" if request.kind is JobKind.SEED else None),
            version=served.version + 1 if served else 1,
        )
        changes.jobs[job_id] = job
        self._busy[job_id] = frozenset(job.positions)
        if request.cluster_id is not None:
            cluster = self._buffers.clusters[request.cluster_id]
            self._buffers.put_cluster(replace(cluster, state=ClusterState.TRAINING), changes)
            self._buffers.take_out(cluster.cluster_id, cluster.tenant)
            ready = {"rows": len(request.rows)}
            self._tell(EventType.BUFFER_READY, cluster.cluster_id, job.attempt, changes, ready)
        if job.expert_id is not None:
            data = {"job": job_id, "kind": job.kind, "rows": len(request.rows), "version": job.version}
            self._tell(EventType.TRAINING_STARTED, job.expert_id, job.attempt, changes, data)
        return changes

    # ── finish ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_reference(self) -> bool:
        """Whether `refer_to` was called."""
        return self._buffers.reference is not None

    def refer_to(self, reference: Reference) -> None:
        """What similarities are measured against; it comes with the first sketch job."""
        self._buffers.refer_to(reference)

    def sketched(self, job: JobRecord, sketches: Mapping[str, np.ndarray]) -> Changes:
        """A sketch job is done: rows that a newer expert knows go to it, the others are clustered."""
        changes = Changes()
        changes.jobs[job.job_id] = self._ended(job, JobState.DONE)
        self._agenda.done(job)
        for position, sketch in sketches.items():
            row = self._buffers.rows[position]
            if row.state is RowState.WAITING:
                self._tell_moved(self._buffers.place(replace(row, sketch=sketch), changes), position, changes)
        self._reassign(changes, [RowState.CLUSTERED])  # nobody is new to claim the others
        for tenant in sorted({self._buffers.rows[position].tenant for position in sketches}):
            self._tell_moved(self._buffers.recluster(tenant, changes), job.job_id, changes)
        self._buffers.expire(self._clock.now_ms(), changes)
        self._tell_held_back(changes)
        return changes

    def _tell_held_back(self, changes: Changes) -> None:
        """Said once of each cluster that waits for a place: retire an expert, or raise `pool.slots`."""
        for cluster in self._agenda.held_back(self.registry):
            if cluster.cluster_id not in self._told_held_back:
                self._told_held_back.add(cluster.cluster_id)
                told = {"experts": len(self.registry.experts), "tenant": cluster.tenant}
                self._tell(EventType.CLUSTER_HELD_BACK, cluster.cluster_id, "held_back", changes, told)

    def trained(self, job: JobRecord, report: Mapping[str, Any], registry: Registry | None) -> Changes:
        """A training job is done; `registry` holds the new version where the check let it through."""
        changes = Changes()
        changes.jobs[job.job_id] = self._ended(job, JobState.DONE, report)
        self._agenda.done(job)
        expert_id = job.expert_id or ""
        said = {"job": job.job_id, **report}
        self._tell(EventType.TRAINING_COMPLETED, expert_id, job.attempt, changes, said)
        if registry is not None:
            self._go_live(job, report, registry, changes)
        elif job.kind is JobKind.CONSOLIDATE:
            self._agenda.was_in_vain(job)
            self._tell(EventType.EXPERT_REJECTED, expert_id, job.attempt, changes, report)
        else:
            self._settle(job, report, changes)
        return changes

    def failed(self, job: JobRecord, error: str) -> Changes:
        """A job ended without a result; it is tried again. Rows among the changes are given up: the child cannot sketch
        them."""
        changes = Changes()
        changes.jobs[job.job_id] = self._ended(job, JobState.FAILED, {"error": error})
        entity = job.expert_id or job.job_id
        said = {"job": job.job_id, "error": error}
        self._tell(EventType.TRAINING_FAILED, entity, job.attempt, changes, said)
        if job.cluster_id is not None:
            self._reopen(self._buffers.clusters[job.cluster_id], changes)
        row = self._buffers.rows.get(self._agenda.failed(job) or "")
        if row is not None and row.state is RowState.WAITING:
            self._buffers.put(replace(row, state=RowState.SETTLED), changes)
        return changes

    def _ended(self, job: JobRecord, state: JobState, report: Mapping[str, Any] | None = None) -> JobRecord:
        """The job's record; its rows may be let go of again."""
        self._busy.pop(job.job_id, None)
        return replace(job, state=state, report=report or {})

    def _go_live(
        self, job: JobRecord, report: Mapping[str, Any], registry: Registry, changes: Changes
    ) -> None:
        expert_id = job.expert_id or ""
        version = registry.expert(expert_id)
        if version is None:
            raise ValueError(f"the new registry has no expert {expert_id}")
        changes.versions.append(version)
        self._publish(registry, [expert_id], changes)
        kind = EventType.EXPERT_SPAWNED if job.kind is JobKind.SEED else EventType.EXPERT_PROMOTED
        self._tell(kind, expert_id, job.job_id, changes, {"version": version.version, **report})
        trained = set(job.positions)
        if job.cluster_id is not None:
            cluster = self._buffers.clusters[job.cluster_id]
            learned = replace(cluster, state=ClusterState.LEARNED, expert_id=expert_id)
            self._buffers.put_cluster(learned, changes)
            trained |= {row.position for row in self._buffers.members(job.cluster_id)}
        for position in sorted(trained):
            is_trained = position in job.positions
            self._buffers.assign(self._buffers.rows[position], expert_id, changes, is_trained=is_trained)
        self._agenda.has_new_version(expert_id)
        self._knowledge.refresh(registry)
        self._reassign(changes)

    def _settle(self, job: JobRecord, report: Mapping[str, Any], changes: Changes) -> None:
        """A cluster that needs no expert of its own, or did not earn one."""
        cluster = self._buffers.clusters[job.cluster_id or ""]
        decision, neighbour = report["decision"], str(report.get("with"))
        if decision in ("drift", "confused") and self.registry.expert(neighbour) is not None:
            learned = replace(cluster, state=ClusterState.LEARNED, expert_id=neighbour)
            self._buffers.put_cluster(learned, changes)
            members = self._buffers.members(cluster.cluster_id)
            for row in members:
                self._buffers.assign(row, neighbour, changes)
            merged = {"into": neighbour, "reason": decision, "rows": len(members)}
            self._tell(EventType.CLUSTER_MERGED, cluster.cluster_id, job.attempt, changes, merged)
        elif decision == "known_to_backbone":
            self._buffers.put_cluster(replace(cluster, state=ClusterState.KNOWN), changes)
            self._buffers.settle(cluster.cluster_id, changes)
        else:
            self._tell(EventType.EXPERT_REJECTED, job.expert_id or "", job.attempt, changes, report)
            self._back_off(cluster, changes)

    def _back_off(self, cluster: ClusterRecord, changes: Changes) -> None:
        rejections = cluster.rejections + 1
        if rejections < self._rules.max_rejections:
            wanted = self._rules.rows_wanted(rejections)
            self._reopen(replace(cluster, rejections=rejections, rows_wanted=wanted), changes)
            return
        self._buffers.put_cluster(
            replace(cluster, state=ClusterState.UNLEARNABLE, rejections=rejections), changes
        )
        numbers = {"attempts": rejections}
        self._tell(EventType.CLUSTER_UNLEARNABLE, cluster.cluster_id, "unlearnable", changes, numbers)
        self._buffers.settle(cluster.cluster_id, changes)

    def _reopen(self, cluster: ClusterRecord, changes: Changes) -> None:
        """Its training came to nothing: it gathers rows again."""
        self._buffers.put_cluster(replace(cluster, state=ClusterState.OPEN), changes)
        self._buffers.bring_back(cluster.cluster_id)

    # ── retire ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def retire(self, expert_id: str) -> Changes:
        """An operator takes the expert out of service; nothing changes where it is gone already."""
        version = self.registry.expert(expert_id)
        if version is None:
            return Changes()
        rows, now_ms = self._buffers.rows.values(), self._clock.now_ms()
        changes = retirement(version, self.registry, rows, self._codec, now_ms)
        self.registry = self.registry.without(expert_id)
        self._buffers.dismiss(expert_id, changes.rows)
        self._knowledge.refresh(self.registry)
        return changes

    # ── adopt ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def adopt(self, registry: Registry, unpublished: Sequence[str]) -> Changes:
        """Other experts are in service than was known here; those that the workers have not heard of are published."""
        changes = Changes()
        for version in self.registry.experts:
            if registry.expert(version.expert_id) is None:
                changes.rows |= put_aside(version.expert_id, self._buffers.rows.values())
                self._buffers.dismiss(version.expert_id, changes.rows)
        self.registry = changes.registry = registry
        if unpublished:
            self._publish(registry, unpublished, changes)
        return changes

    def look_again(self) -> Changes:
        """Reads the experts of the registry and asks them about the rows that wait. Raises ExpertCorrupt."""
        changes = Changes()
        self._knowledge.refresh(self.registry)
        self._reassign(changes)
        return changes

    # ── what they share ─────────────────────────────────────────────────────────────────────────────────────────────

    def _reassign(self, changes: Changes, states: Sequence[RowState] = UNCLAIMED) -> None:
        """Waiting rows that the newest experts may claim are theirs."""
        clusters = self._buffers.clusters.items()
        training = {key for key, cluster in clusters if cluster.state is ClusterState.TRAINING}
        waiting = [
            row
            for state in states
            for row in self._buffers.rows.in_state(state)
            if row.cluster_id not in training
        ]
        for tenant in sorted({row.tenant for row in waiting}):
            rows = [row for row in waiting if row.tenant == tenant]
            features = np.stack([row.features for row in rows])
            matches = self._knowledge.match(tenant, features, [row.sketch for row in rows])
            for position, expert_id in claims(rows, matches, self._knowledge).items():
                self._buffers.assign(self._buffers.rows[position], expert_id, changes)

    def _publish(self, registry: Registry, expert_ids: Sequence[str], changes: Changes) -> None:
        """Manifests first, the registry last: whoever reads the registry finds what it names."""
        self.registry = changes.registry = registry
        for expert_id in expert_ids:
            version = registry.expert(expert_id)
            if version is not None:
                changes.messages.append(self._codec.encode_manifest(version))
        changes.messages.append(self._codec.encode_registry(registry))

    def _tell_moved(self, moved: Moved, cause: str, changes: Changes) -> None:
        for kind, cluster_id, data in moved.told():
            self._tell(kind, cluster_id, cause, changes, data)

    def _tell(
        self, kind: EventType, entity: str, cause: str, changes: Changes, data: Mapping[str, Any]
    ) -> None:
        event = lifecycle_event(kind, entity, cause, self._clock.now_ms(), data)
        changes.messages.append(self._codec.encode_event(event))
        changes.events.append(kind)
