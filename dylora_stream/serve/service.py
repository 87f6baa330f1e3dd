"""The serve loop: registry, poll, answer, one transaction, and a clean end.

The order of a batch (the transaction's steps 1, 2 and 4 to 8 live in the source and the sink):

    a  take the newest registry, whole, between batches, once it has been prepared beside them
    b  poll (steps 1, 2)
    c  answer, outside the transaction (step 3)
    d  publish results, events, samples, dead letters and offsets (steps 4 to 8)
    e  on TransactionAborted: rewind the source; the same records come again

A batch that took longer than a minute is followed by smaller ones, until they do not: one that outlives its place in
the group could never be committed, and would be answered for ever.

Invariant: nothing of a batch is kept but how long it took, so one taken again gives the same kind of outcome.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from dylora_stream.core.errors import BadRecord, TransactionAborted
from dylora_stream.core.events import EventType, lifecycle_event
from dylora_stream.core.experts import Registry
from dylora_stream.core.messages import RawRecord
from dylora_stream.core.ports import (
    LONGEST_POLL_S,
    Activation,
    Answerer,
    Changelog,
    Clock,
    Codec,
    CrashJournal,
    LoadFailure,
    Sink,
    Source,
)
from dylora_stream.serve.pipeline import Outcome, Pipeline, Serving
from dylora_stream.serve.poison import MOST_ENDS, PoisonGuard

__all__ = ["ServeConfig", "ServeMetrics", "ServePorts", "ServeService", "Worker"]

LONG_BATCH_S = 60.0  # a group gives up a member that does not poll for kafka.max_poll_interval_s, ten minutes
FIRST_RETRY_S = 5.0  # before versions that could not be loaded are tried again, doubled each time
LONGEST_RETRY_S = 300.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How serve takes its records."""

    batch_records: int = 64  # most records of one transaction: latency against throughput
    poll_timeout_s: float = 0.25  # how long an idle poll blocks
    registry_timeout_s: float = 30.0  # how long the start waits for the registry's topic
    drain_deadline_s: float = (
        30.0  # after SIGTERM a role may take this long to end, learn as well; then it is killed
    )
    sample_share: float = 0.02  # of plain records kept for learning; 0 to 1

    def __post_init__(self) -> None:
        if self.batch_records < 1:
            raise ValueError(f"batch_records must be at least 1, not {self.batch_records}")
        if not (0 <= self.poll_timeout_s <= LONGEST_POLL_S and self.registry_timeout_s > 0):
            raise ValueError(
                f"poll_timeout_s is {self.poll_timeout_s} and registry_timeout_s {self.registry_timeout_s}: use 0 to "
                f"{LONGEST_POLL_S:g}, and more than 0"
            )
        if self.drain_deadline_s < 0:
            raise ValueError(f"drain_deadline_s must be at least 0, not {self.drain_deadline_s}")
        if not 0 <= self.sample_share <= 1:
            raise ValueError(f"sample_share must lie between 0 and 1, not {self.sample_share}")


class ServeMetrics(Protocol):
    """What the loop tells the operator's metrics."""

    def polled(self, lag_records: Callable[[], float]) -> None:
        """The source was asked; `lag_records` may be called, here in the loop's thread, where a client is safe."""

    def answered(self, outcome: Outcome, latency_s: float) -> None:
        """A batch is on the broker."""

    def aborted(self) -> None:
        """A transaction did not happen."""

    def activated(self, registry: Registry, failed: Sequence[LoadFailure]) -> None:
        """A registry is being served, but for what of it could not be loaded."""

    def happened(self, kind: EventType) -> None:
        """A lifecycle event was published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePorts:
    """What the loop is wired to."""

    source: Source
    sink: Sink
    changelog: Changelog
    answerer: Answerer
    codec: Codec
    clock: Clock
    metrics: ServeMetrics
    journal: CrashJournal


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Who answers: the model's name, the space of its features, and the boot that events are told apart by."""

    model: str
    feature_space: str
    boot: str


@dataclass(slots=True)
class _Progress:
    registry: Registry = field(default_factory=Registry)
    newest: Registry = field(default_factory=Registry)
    preparing: tuple[Registry, Future[Activation]] | None = None
    missing: frozenset[str] = frozenset()  # what of the registry could not be loaded, and was told of
    retry_at_s: float | None = None  # when that is tried again, by the clock
    retry_wait_s: float = FIRST_RETRY_S
    batch_records: int = 1  # most records of the next batch
    is_ready: bool = False
    is_draining: bool = False


class ServeService:
    """Runs until it is told to drain."""

    def __init__(self, ports: ServePorts, pipeline: Pipeline, config: ServeConfig, worker: Worker) -> None:
        self._ports = ports
        self._pipeline = pipeline
        self._config = config
        self._worker = worker
        self._progress = _Progress(batch_records=config.batch_records)
        self._guard = PoisonGuard(ports.journal)
        self._preparer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")

    @property
    def is_ready(self) -> bool:
        """Whether the registry was read and records are being taken."""
        return self._progress.is_ready

    @property
    def registry(self) -> Registry:
        """The registry being served."""
        return self._progress.registry

    def drain(self) -> None:
        """Finish the batch at hand, then leave `run`. Callable from a signal handler."""
        self._progress.is_draining = True

    def run(self) -> None:
        """Answer until drained; a BrokerError, StoreError or ModelError ends it."""
        self._note(self._ports.changelog.catch_up(self._config.registry_timeout_s))
        self.take_newest()
        self._announce(EventType.WORKER_STARTED)
        self._progress.is_ready = True
        log.info(
            "worker_started", role="serve", registry=self.registry.number, experts=len(self.registry.experts)
        )
        while not self._progress.is_draining:
            self.step()
        self._progress.is_ready = False
        self._preparer.shutdown(cancel_futures=True)
        self._announce(EventType.WORKER_STOPPED)
        log.info("worker_stopped", role="serve")

    def take_newest(self) -> None:
        """Swap to the newest registry, waiting for it: `step` goes on with the old one while it is being prepared."""
        self._note(self._ports.changelog.poll())
        self._prepare()
        self._activate(is_waiting=True)

    def step(self) -> int:
        """One batch, a to e; returns how many records it settled."""
        self._note(self._ports.changelog.poll())
        self._prepare()
        self._activate()
        batch = self._ports.source.poll(self._progress.batch_records, self._config.poll_timeout_s)
        self._ports.metrics.polled(self._ports.source.lag_records)
        if not batch:
            return 0
        started_s = self._ports.clock.monotonic_s()
        serving = Serving(
            model=self._worker.model,
            registry_number=self.registry.number,
            feature_space=self._worker.feature_space,
        )
        outcome = self._answer(batch.records, serving)
        self._measure(len(batch.records), self._ports.clock.monotonic_s() - started_s)
        try:
            self._ports.sink.publish(outcome.messages, batch.checkpoint)
        except TransactionAborted as error:
            log.warning("transaction_aborted", role="serve", reason=str(error), records=len(batch.records))
            self._ports.metrics.aborted()
            self._ports.source.rewind()
            return 0
        self._guard.settled(batch.records)
        self._ports.metrics.answered(outcome, self._ports.clock.monotonic_s() - started_s)
        for reason, count in Counter(letter.reason for letter in outcome.dead_letters).items():
            first = next(letter for letter in outcome.dead_letters if letter.reason == reason)
            log.warning("dead_lettered", reason=reason, records=count, position=str(first.record.position))
        return len(batch.records)

    def _answer(self, records: Sequence[RawRecord], serving: Serving) -> Outcome:
        """All at once, but for those during which an earlier process may have ended."""
        outcome = Outcome()
        for part in self._guard.parts(records):
            ends = self._guard.ends(part[0])
            if ends >= MOST_ENDS:
                outcome.add(self._pipeline.bury_poison(part[0], ends))
                continue
            with self._guard.holding(part):
                outcome.add(self._pipeline.answer(part, serving))
        return outcome

    def _measure(self, records: int, took_s: float) -> None:
        """How many records the next batch may have."""
        if took_s > LONG_BATCH_S and records > 1:
            self._progress.batch_records = records // 2
            log.warning("batch_shortened", records=records // 2, took_s=round(took_s), before=records)
        elif took_s < LONG_BATCH_S / 4:
            self._progress.batch_records = min(2 * self._progress.batch_records, self._config.batch_records)

    def _note(self, records: list[RawRecord]) -> None:
        for record in records:
            try:
                found = self._ports.codec.decode_registry(record)
            except BadRecord as error:
                log.warning("manifest_unreadable", position=str(record.position), reason=error.reason)
                continue
            if found is not None:
                self._progress.newest = found

    def _prepare(self) -> None:
        """Begin with the newest registry, or again with one that was served in part; one at a time."""
        progress = self._progress
        is_due = progress.retry_at_s is not None and self._ports.clock.monotonic_s() >= progress.retry_at_s
        if progress.preparing is None and (progress.newest.number != self.registry.number or is_due):
            future = self._preparer.submit(self._ports.answerer.prepare, progress.newest)
            progress.preparing = (progress.newest, future)

    def _activate(self, *, is_waiting: bool = False) -> None:
        """Swap to the registry that is prepared, if one is; `is_waiting` waits for it."""
        if self._progress.preparing is None:
            return
        newest, future = self._progress.preparing
        if not (is_waiting or future.done()):
            return
        self._progress.preparing = None
        failed = future.result()()
        is_retry = newest.number == self.registry.number
        self._progress.registry = newest
        self._ports.metrics.activated(newest, failed)
        log.info(
            "registry_activated",
            registry=newest.number,
            experts=len(newest.experts),
            failed=[failure.name for failure in failed],
        )
        self._follow_up(failed, is_retry=is_retry)

    def _follow_up(self, failed: Sequence[LoadFailure], *, is_retry: bool) -> None:
        """Tell of what could not be loaded, once a registry, and set the time at which it is tried again."""
        progress = self._progress
        for failure in failed:
            if not (is_retry and failure.name in progress.missing):
                self._tell_failure(failure)
        progress.missing = frozenset(failure.name for failure in failed)
        wait_s = min(2 * progress.retry_wait_s, LONGEST_RETRY_S) if is_retry else FIRST_RETRY_S
        progress.retry_wait_s, progress.retry_at_s = wait_s, None
        if any(failure.may_pass for failure in failed):
            progress.retry_at_s = self._ports.clock.monotonic_s() + wait_s

    def _tell_failure(self, failure: LoadFailure) -> None:
        number = self.registry.number
        log.warning("expert_load_failed", expert=failure.name, reason=failure.reason, registry=number)
        data = {"registry": number, "reason": failure.reason}
        self._announce(EventType.EXPERT_LOAD_FAILED, failure.name, data)

    def _announce(
        self, kind: EventType, entity: str | None = None, data: dict[str, object] | None = None
    ) -> None:
        worker = f"serve-{self._worker.boot}"
        cause = f"{worker}:{self.registry.number}"
        event = lifecycle_event(
            kind, entity or worker, cause, self._ports.clock.now_ms(), data or {"role": "serve"}
        )
        try:
            self._ports.sink.publish([self._ports.codec.encode_event(event)])
        except TransactionAborted as error:
            log.warning("event_dropped", kind=kind, reason=str(error))
        else:
            self._ports.metrics.happened(kind)
