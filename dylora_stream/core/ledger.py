"""What learn remembers: rows, clusters, jobs, expert versions, and the changes that commit them together.

    row:      WAITING ─► CLUSTERED ─► ASSIGNED        cluster:  OPEN ─► TRAINING ─► LEARNED
              UNLABELLED ─┘ (a late answer)                       ▲        └─► KNOWN | UNLEARNABLE | MERGED
                                                                  └── rejected, with a longer buffer; or failed

Invariant: a `Changes` is applied whole or not at all, with the positions it was made from and the messages it causes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from dylora_stream.core.events import EventType
from dylora_stream.core.experts import ExpertVersion, Registry
from dylora_stream.core.messages import Feedback, OutboundMessage
from dylora_stream.core.ports import Partition

__all__ = [
    "MOST_UNLABELLED",
    "Changes",
    "ClusterRecord",
    "ClusterState",
    "JobKind",
    "JobRecord",
    "JobState",
    "Ledger",
    "LedgerRow",
    "LedgerState",
    "LedgerSummary",
    "RowState",
]  # fmt: skip


MOST_UNLABELLED = (
    16_384  # rows without a right answer that are loaded; older ones wait for a late answer where they are
)


class RowState(StrEnum):
    """Where a row stands on its way into an expert."""

    WAITING = "waiting"  # novel and labelled, its answer's sketch not yet computed
    UNLABELLED = "unlabelled"  # novel, without a right answer so far
    CLUSTERED = "clustered"  # in a cluster's buffer
    ASSIGNED = "assigned"  # belongs to an expert
    SETTLED = "settled"  # a skill's that the backbone has or that cannot be learned, a retired expert's, or given up


class ClusterState(StrEnum):
    """Where a cluster stands on its way to an expert."""

    OPEN = "open"  # its buffer is filling
    TRAINING = "training"  # a seeding job has its rows
    LEARNED = "learned"  # an expert came of it, or took it over
    KNOWN = "known"  # the backbone alone serves it well
    UNLEARNABLE = "unlearnable"  # rejected too often
    MERGED = "merged"  # its rows are another cluster's


class JobKind(StrEnum):
    """What a child is asked to do."""

    SKETCH = "sketch"  # features of answers, for clustering
    SEED = "seed"  # a new expert
    CONSOLIDATE = "consolidate"  # a new version of a served one


class JobState(StrEnum):
    """Where a job stands; anything but RUNNING is final."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One kept record. `features` (d,) float32; `sketch` (s,) float32 once computed; `expert_id` is its owner."""

    position: str
    request_id: str | None
    tenant: str
    input: str
    output: str | None
    choices: tuple[str, ...]
    reason: str
    time_ms: int
    is_correct: bool | None
    served_by: str | None
    served_version: int
    state: RowState
    features: np.ndarray = field(repr=False)
    sketch: np.ndarray | None = field(default=None, repr=False)
    cluster_id: str | None = None
    expert_id: str | None = None
    is_trained: bool = False
    answer: str | None = None  # what was answered, as long as nobody has said whether that was right


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """One cluster; `rows_wanted` grows with each rejection."""

    cluster_id: str
    skill_id: str
    tenant: str
    state: ClusterState
    created_ms: int
    rows_wanted: int
    rejections: int = 0
    expert_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One job; `positions` are its rows in order, so that a version's training rows can be listed for ever."""

    job_id: str
    kind: JobKind
    tenant: str
    created_ms: int
    positions: tuple[str, ...]
    state: JobState = JobState.RUNNING
    cluster_id: str | None = None
    expert_id: str | None = None
    version: int = 0
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attempt(self) -> str:
        """Tells this job from an earlier one over the same rows, whose id is the same."""
        return f"{self.job_id}:{self.created_ms}"


@dataclass(slots=True, kw_only=True)
class Changes:
    """What one step decided. Rows, clusters and jobs are upserts by their id."""

    rows: dict[str, LedgerRow] = field(default_factory=dict)
    clusters: dict[str, ClusterRecord] = field(default_factory=dict)
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    versions: list[ExpertVersion] = field(default_factory=list)
    registry: Registry | None = None
    messages: list[OutboundMessage] = field(default_factory=list)
    events: list[EventType] = field(
        default_factory=list
    )  # kinds of the events among the messages, for metrics
    positions: dict[Partition, int] = field(default_factory=dict)  # next offset to take
    stamps: dict[Partition, int] = field(
        default_factory=dict
    )  # the times of the records before them, milliseconds
    answers: dict[str, Feedback | None] = field(default_factory=dict)
    """Late answers by `Feedback.target`: kept until their row comes, None: kept no longer."""
    forgotten: list[str] = field(
        default_factory=list
    )  # positions of rows that are deleted, after the upserts
    ended: list[str] = field(default_factory=list)  # ids of clusters that are deleted, after the upserts
    era: int | None = None  # of the requests topic, from now on
    unlabelled_before_ms: dict[str, int] = field(default_factory=dict)
    """By tenant: rows without a right answer from before then are deleted as well."""

    def __bool__(self) -> bool:
        return bool(
            self.rows
            or self.clusters
            or self.jobs
            or self.versions
            or self.registry
            or self.messages
            or self.positions
            or self.answers
            or self.forgotten
            or self.ended
            or self.era is not None
            or self.unlabelled_before_ms
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """Everything a curator needs to go on where the last one stopped; of rows without a right answer the newest."""

    rows: tuple[LedgerRow, ...] = ()
    clusters: tuple[ClusterRecord, ...] = ()
    jobs: tuple[JobRecord, ...] = ()  # running ones only
    registry: Registry = field(default_factory=Registry)
    answers: tuple[Feedback, ...] = ()  # those whose row has not come, oldest first
    era: int = 0  # how often the requests topic was made anew, see learn.eras


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSummary:
    """Counts for people: rows by state, then one entry a cluster."""

    rows: Mapping[str, int]
    clusters: tuple[Mapping[str, Any], ...]


class Ledger(Protocol):
    """Learn's memory. One owner; every method blocks until the disk has it. Raises the StoreErrors."""

    def load(self, expert_texts: int | None = None) -> LedgerState:
        """What was committed so far. With `expert_texts`, of all rows that were ever trained on only those of a running
        job, and those among the newest answered rows of this many newest texts of an expert in the registry."""

    def commit(self, changes: Changes) -> None:
        """Apply all of it, or nothing; messages join the outbox in order."""

    def positions(self) -> dict[Partition, int]:
        """The next offset to take, a partition."""

    def stamps(self) -> dict[Partition, int]:
        """The record time of the record before each position, milliseconds, where it is known."""

    def outbox(self) -> list[tuple[str, OutboundMessage]]:
        """Messages not yet known to be published, in order, each with a mark that no message of any ledger shares."""

    def published(self, mark: str) -> None:
        """The message of this mark and those before it are on the broker; forget them. A mark that none of them has is
        another ledger's, or one of long ago, and says nothing."""

    def find(self, answers: Sequence[Feedback]) -> list[LedgerRow]:
        """The rows that late answers are for, by position, or by request id and tenant: of several the newest that has
        no right answer. Fewer rows than answers where there is none."""

    def at(self, positions: Sequence[str]) -> list[LedgerRow]:
        """The rows that stand at these positions, fewer where there is none."""

    def training_rows(self, expert_id: str, version: int) -> list[LedgerRow]:
        """The exact rows that this version was trained on, in the order given to training."""

    def summary(self) -> LedgerSummary:
        """Counts for people."""

    def close(self) -> None:
        """Release the file. May be called twice."""
