"""The learn loop: samples in, decisions and outbox in one DuckDB transaction, outbox to Kafka, jobs to the child.

The order of a step:

    0  what the experts topic says is in service is taken over, see `learn.in_service`
    1  the source takes the group's metadata, then polls (steps 1, 2 of the design's transaction); where a topic does
       not hold the database's positions any more, these are set anew, committed, and the records taken after that
    2  the curator decides about new records; rows, decisions, positions and outbox commit together
    3  experts that an operator retires, and what the child said, are decided about and committed the same way; the
       folder of a job whose end is committed is removed
    4  the next job's folder is written, its start committed, and then the child is told
    5  the outbox goes to Kafka in one transaction whose offset metadata carries the mark of its last message
    6  on TransactionAborted: rewind the source (to DuckDB's positions) and go on; the outbox is still there

After a crash or an abort the mark read from Kafka says which messages of the outbox are out already, so each is sent
once; while it cannot be read, nothing is sent. A mark names one message of one database: what a lost database or
another learn has noted there says nothing of this one's.
Torch is never imported here; all that needs the backbone is the child's.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import structlog

from dylora_stream.core.errors import TrainingFailed, TransactionAborted
from dylora_stream.core.events import EventType, lifecycle_event
from dylora_stream.core.experts import Registry
from dylora_stream.core.ledger import Changes, JobKind, JobRecord, Ledger
from dylora_stream.core.messages import RawRecord, Sample
from dylora_stream.core.ports import (
    LONGEST_POLL_S,
    Changelog,
    Checkpoint,
    Child,
    Clock,
    Codec,
    ExpertStore,
    JobUpdate,
    Sink,
    Source,
)
from dylora_stream.learn.curator import Curator
from dylora_stream.learn.in_service import ExpertsTopic, missing_from
from dylora_stream.learn.intake import Intake
from dylora_stream.learn.jobs import (
    job_digest,
    read_reference,
    read_report,
    read_sketches,
    remove_job,
    remove_jobs_but,
    row_document,
    write_job,
)
from dylora_stream.learn.outbox import Outbox
from dylora_stream.learn.training import Training

__all__ = ["LearnConfig", "LearnFolders", "LearnMetrics", "LearnPorts", "LearnService"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnConfig:
    """How learn takes its records and runs its child."""

    batch_records: int = 256  # most samples of one DuckDB transaction
    poll_timeout_s: float = 0.25  # how long an idle poll blocks
    registry_timeout_s: float = 30.0  # how long the start waits for the experts topic
    threads: int = 1  # of the child; with serve on the same two cores, one
    niceness: int = 10  # of the child, 0 to 19
    seed: int = 0  # of every job, with its rows

    def __post_init__(self) -> None:
        if self.batch_records < 1 or self.threads < 1:
            raise ValueError("batch_records and threads must be at least 1")
        if not (0 <= self.poll_timeout_s <= LONGEST_POLL_S and self.registry_timeout_s > 0):
            raise ValueError(
                f"poll_timeout_s is {self.poll_timeout_s} and registry_timeout_s {self.registry_timeout_s}: use 0 to "
                f"{LONGEST_POLL_S:g}, and more than 0"
            )
        if not 0 <= self.niceness <= 19:
            raise ValueError(f"niceness must lie between 0 and 19, not {self.niceness}")


class LearnMetrics(Protocol):
    """What the loop tells the operator's metrics."""

    def polled(self, lag_records: Callable[[], float]) -> None:
        """The source was asked; `lag_records` may be called, here in the loop's thread, where a client is safe."""

    def sampled(self, samples: Sequence[Sample]) -> None:
        """Samples were committed."""

    def job_ended(self, kind: str, outcome: str) -> None:
        """A job has its end."""

    def aborted(self) -> None:
        """A transaction did not happen."""

    def happened(self, kind: EventType) -> None:
        """A lifecycle event was committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnPorts:
    """What the loop is wired to."""

    source: Source
    sink: Sink
    experts: Changelog  # the experts topic
    ledger: Ledger
    child: Child
    store: ExpertStore
    codec: Codec
    clock: Clock
    metrics: LearnMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnFolders:
    """Where jobs and the reference of similarities lie, and which topic carries feedback."""

    jobs: Path
    reference: Path
    feedback_topic: str


class LearnService:
    """Runs until it is told to drain."""

    def __init__(
        self,
        ports: LearnPorts,
        curator: Curator,
        config: LearnConfig,
        training: Training,
        folders: LearnFolders,
    ) -> None:
        self._ports = ports
        self._curator = curator
        self._config = config
        self._training = training
        self._folders = folders
        self._experts = ExpertsTopic(ports.codec)
        self._outbox = Outbox(ports.ledger, ports.source, ports.sink)
        self._intake = Intake(
            ports.ledger,
            ports.codec,
            curator,
            feature_space=training.feature_space,
            feedback_topic=folders.feedback_topic,
        )
        self._resume: deque[JobRecord] = deque()
        self._running: JobRecord | None = None
        self._progress_told = 0.0
        self._leaving: SimpleQueue[str] = SimpleQueue()  # experts to retire, asked for from other threads
        self.is_ready = False
        self._is_draining = False

    def drain(self) -> None:
        """Finish the step at hand, then leave `run`. Callable from a signal handler."""
        self._is_draining = True

    def retire(self, expert_id: str) -> None:
        """Take an expert out of service with the next step. Callable from any thread. Raises ExpertUnknown."""
        self._leaving.put(self._curator.registry.named(expert_id).expert_id)

    def run(self) -> None:
        """Learn until drained; a BrokerError or StoreError ends it."""
        self.recover()
        self.is_ready = True
        log.info("worker_started", role="learn", experts=len(self._curator.registry.experts))
        while not self._is_draining:
            self.step()
        self.is_ready = False
        self._ports.child.close()
        log.info("worker_stopped", role="learn")

    def recover(self) -> None:
        """Go on where the last process stopped: published messages are forgotten, the experts in service taken over,
        running jobs taken up again, and folders of ended ones removed. Raises ModelMismatch."""
        self._keep_to_one_model()
        self._outbox.forget_published()
        self._experts.hear(self._ports.experts.catch_up(self._config.registry_timeout_s))
        self._agree()
        self._intake.resume(self._curator.era)
        self._resume.extend(self._curator.left_running)
        remove_jobs_but(self._folders.jobs, {job.job_id for job in self._resume})
        self._read_reference()

    def step(self) -> int:
        """One round, 0 to 6; returns how many records it took."""
        if self._experts.hear(self._ports.experts.poll()):
            self._agree()
        batch = self._ports.source.poll(self._config.batch_records, self._config.poll_timeout_s)
        self._ports.metrics.polled(self._ports.source.lag_records)
        if batch.restarted:
            self._commit(self._intake.restart(batch.restarted))
        self._take(batch.records, batch.checkpoint)
        while not self._leaving.empty():
            self._commit(self._curator.retire(self._leaving.get()))
        for update in self._ports.child.updates():
            self._hear(update)
        if self._running is None and self._ports.child.is_idle:
            self._start_next()
        self._publish(batch.checkpoint)
        return len(batch.records)

    def _commit(self, changes: Changes) -> None:
        self._ports.ledger.commit(changes)
        for kind in changes.events:
            self._ports.metrics.happened(kind)

    def _keep_to_one_model(self) -> None:
        """The database's rows and experts are of one backbone and one feature space; an empty one takes this
        process's."""
        own = self._curator.registry
        if own.experts or self._curator.summary()["rows"]:
            self._training.refuse_other_model(own, "the rows and experts of learn's database are")
        if own != (named := self._training.named(own)):
            self._commit(self._curator.adopt(named, unpublished=()))

    # ── 0: the experts in service ────────────────────────────────────────────────────────────────────────────────────

    def _agree(self) -> None:
        """Committed before the experts' files are read: one that is damaged can then be retired by its name."""
        agreed, published = self._experts.agree(
            self._curator.registry, [message for _, message in self._ports.ledger.outbox()]
        )
        self._training.refuse_other_model(published, "the experts in service are")
        unpublished = missing_from(published, agreed)
        if agreed is self._curator.registry and not unpublished:
            return
        log.info("experts_adopted", experts=len(agreed.experts), unpublished=unpublished)
        self._commit(self._curator.adopt(agreed, unpublished))
        self._commit(self._curator.look_again())

    # ── 2: records ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, records: Sequence[RawRecord], checkpoint: Checkpoint) -> None:
        taken = self._intake.take(records, checkpoint)
        if taken is not None:
            changes = self._curator.take(taken.samples, taken.feedback, taken.positions)
            changes.stamps, changes.era = taken.stamps, taken.era
            self._commit(changes)
            self._ports.metrics.sampled(taken.samples)

    # ── 3: what the child says ───────────────────────────────────────────────────────────────────────────────────────

    def _hear(self, update: JobUpdate) -> None:
        job = self._running
        if job is None or update.job != job.job_id:
            return
        if update.progress is not None:
            self._tell_progress(job, update.progress)
            return
        self._running = None
        self._commit(self._ended(job, update))
        remove_job(self._folders.jobs, job.job_id)

    def _ended(self, job: JobRecord, update: JobUpdate) -> Changes:
        """What a job's end changes."""
        if update.result is None:
            return self._failed(job, update.error or "no result")
        try:
            return self._finish(job, update.result)
        except TrainingFailed as error:  # a damaged file: with its folder gone the job is done anew
            return self._failed(job, str(error))

    def _failed(self, job: JobRecord, reason: str) -> Changes:
        log.warning("training_failed", job=job.job_id, kind=job.kind, reason=reason)
        changes = self._curator.failed(job, reason)
        for position in changes.rows:
            log.warning("row_given_up", position=position, job=job.job_id, reason=reason)
        self._ports.metrics.job_ended(job.kind, "failed")
        return changes

    def _tell_progress(self, job: JobRecord, progress: Mapping[str, Any]) -> None:
        """An event a quarter of the way; every step in the log, at debug."""
        log.debug("training_progress", job=job.job_id, **progress)
        share = float(progress.get("step", 0)) / max(float(progress.get("steps", 0)), 1.0)
        if job.expert_id is None or share < self._progress_told + 0.25:
            return
        self._progress_told = share
        cause = f"{job.attempt}:{progress.get('step')}"
        now_ms = self._ports.clock.now_ms()
        event = lifecycle_event(
            EventType.TRAINING_PROGRESS, job.expert_id, cause, now_ms, {"job": job.job_id, **progress}
        )
        message = self._ports.codec.encode_event(event)
        self._commit(Changes(messages=[message], events=[EventType.TRAINING_PROGRESS]))

    def _finish(self, job: JobRecord, result: Path) -> Changes:
        """What the child brought is decided about. Raises TrainingFailed where it cannot be read."""
        if job.kind is JobKind.SKETCH:
            self._read_reference()
            if not self._curator.has_reference:
                raise TrainingFailed(f"{self._folders.reference} is not there or cannot be read")
            sketches = read_sketches(result, len(job.positions))
            self._ports.metrics.job_ended(job.kind, "done")
            return self._curator.sketched(job, dict(zip(job.positions, sketches, strict=True)))
        if job.kind is JobKind.CONSOLIDATE and self._curator.registry.expert(job.expert_id or "") is None:
            return self._failed(job, "its expert was retired meanwhile")
        report = read_report(result)
        decision = str(report["decision"])
        self._ports.metrics.job_ended(job.kind, decision)
        log.info("training_completed", job=job.job_id, kind=job.kind, expert=job.expert_id, decision=decision)
        registry = self._new_registry(job, report, result) if decision == "promoted" else None
        return self._curator.trained(job, report, registry)

    def _read_reference(self) -> None:
        """The child wrote it with the first sketch job, and writes it with the next one where it is damaged."""
        if self._curator.has_reference or not self._folders.reference.exists():
            return
        try:
            self._curator.refer_to(read_reference(self._folders.reference))
        except TrainingFailed as error:
            log.warning("reference_unreadable", reason=str(error))
            self._folders.reference.unlink()

    def _new_registry(self, job: JobRecord, report: Mapping[str, Any], result: Path) -> Registry:
        """The registry with the job's version in it; its files are in the store before anyone hears of them."""
        registry, store = self._curator.registry, self._ports.store
        served = registry.expert(job.expert_id or "")
        version = self._training.version(job, report, served, store.put(result / "expert"))
        router = store.put(result / "router") if (result / "router").is_dir() else None
        return replace(
            registry.with_expert(version),
            router=router or registry.router,
            feature_space=self._training.feature_space,
            backbone=self._training.backbone,
        )

    # ── 4: the next job ──────────────────────────────────────────────────────────────────────────────────────────────

    def _start_next(self) -> None:
        if self._resume:
            self._take_up(self._resume.popleft())
            return
        request = self._curator.next_job()
        if request is None:
            return
        description = {
            **self._training.description(request, self._curator.registry, self._ports.store),
            "seed": self._config.seed,
            "threads": self._config.threads,
        }
        job_id = job_digest(description, request.rows)
        changes = self._curator.start(request, job_id)
        job = changes.jobs[job_id]
        named = {
            "expert_id": job.expert_id,
            "version": job.version,
            "reference": str(self._folders.reference),
        }
        rows = [row_document(row, request.counts.get(row.input, 1)) for row in request.rows]
        folder = write_job(self._folders.jobs, job_id, description | named, rows)
        self._commit(changes)
        self._submit(job, folder)

    def _take_up(self, job: JobRecord) -> None:
        """A job that a former process left: its result if there is one, the same folder again, or its failure."""
        folder = self._folders.jobs / job.job_id
        if (folder / "result" / "report.json").exists() or (folder / "job.json").exists():
            self._submit(job, folder)
        else:
            self._commit(self._curator.failed(job, "its folder is gone"))
            remove_job(self._folders.jobs, job.job_id)

    def _submit(self, job: JobRecord, folder: Path) -> None:
        log.info(
            "training_started", job=job.job_id, kind=job.kind, expert=job.expert_id, rows=len(job.positions)
        )
        self._running, self._progress_told = job, 0.0
        self._ports.child.submit(folder)

    # ── 5, 6: the outbox ─────────────────────────────────────────────────────────────────────────────────────────────

    def _publish(self, checkpoint: Checkpoint) -> None:
        try:
            self._experts.sent(self._outbox.publish(checkpoint, self._intake.positions))
        except TransactionAborted as error:
            log.warning("transaction_aborted", role="learn", reason=str(error))
            self._ports.metrics.aborted()
