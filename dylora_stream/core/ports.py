"""The ports: what the rooms ask of one another. `bootstrap` wires them; `testing` has one of each in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dylora_stream.core.experts import ExpertVersion, Registry, StoredFolder
from dylora_stream.core.messages import (
    Answer,
    DeadLetter,
    Event,
    Feedback,
    Novelty,
    OutboundMessage,
    RawRecord,
    Request,
    Sample,
)

__all__ = [
    "LONGEST_POLL_S",
    "Activation",
    "Answerer",
    "Batch",
    "Changelog",
    "Checkpoint",
    "Child",
    "Clock",
    "Codec",
    "CrashJournal",
    "ExpertStore",
    "IndexFactory",
    "JobUpdate",
    "LoadFailure",
    "OwnPositions",
    "Partition",
    "Sink",
    "Source",
    "VectorIndex",
]  # fmt: skip

Partition = tuple[str, int]  # topic, partition
LONGEST_POLL_S = 60.0  # an idle poll holds up a new registry, and the end, for as long


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """How far a batch reaches: next offset a partition, the group metadata taken before the poll, and a note.

    `group` is opaque to all but the stream room. `note` is stored beside the offsets (learn's: the mark of the last
    message of its outbox).
    """

    offsets: Mapping[Partition, int]
    group: Any = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Records of one poll in partition order; empty when nothing came, or when the group changed on the way.

    `restarted`: where reading goes on in partitions that did not hold the position to go on from. A reader with
    positions of its own takes these over before it takes the records.
    """

    records: tuple[RawRecord, ...] = ()
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(offsets={}))
    restarted: Mapping[Partition, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.records)


class OwnPositions(Protocol):
    """Where a reader stands that keeps its positions itself, with what it took, and not in Kafka."""

    def positions(self) -> Mapping[Partition, int]:
        """The next offset to take, a partition; one that is not there starts at its beginning."""

    def stamps(self) -> Mapping[Partition, int]:
        """The record time of the record before each position, milliseconds, where it is known."""


class Source(Protocol):
    """Records of one consumer group, in order within a partition."""

    def poll(self, max_records: int, timeout_s: float) -> Batch:
        """Up to `max_records` new records; blocks at most `timeout_s`. Steps 1 and 2 of the transaction: group metadata
        is taken first, and a batch whose generation changed on the way is dropped and rewound. Raises OffsetsLost where
        a topic does not hold the position to go on from, or has another record before it than was taken there;
        BrokerUnreachable, TopicMissing, Fenced."""

    def rewind(self) -> None:
        """Go back to the committed position of every assigned partition (the broker's, or the reader's own). May be
        called at any time between polls, any number of times."""

    def lag_records(self) -> float:
        """End offset minus position, summed over the assigned partitions; NaN where it cannot be known now. May block
        for a round trip; never raises."""

    def assignment(self) -> frozenset[Partition]:
        """The partitions that this member owns now."""

    def committed_notes(self) -> frozenset[str]:
        """The notes stored beside the group's committed offsets, whoever of the group wrote them; none is empty. Raises
        BrokerUnreachable or TransactionAborted where they cannot be read now."""

    def close(self) -> None:
        """Leave the group. May be called twice."""


class Sink(Protocol):
    """Messages and input offsets out, all or nothing."""

    def publish(self, messages: Sequence[OutboundMessage], checkpoint: Checkpoint | None = None) -> None:
        """Send and commit in one transaction (steps 4 to 8); blocks until the broker has it. On TransactionAborted
        nothing happened and the sink is ready for the next call; the caller rewinds its source. Raises Fenced."""

    def close(self) -> None:
        """Give the producer up; what was not committed is aborted. May be called twice."""


class Changelog(Protocol):
    """A compacted topic read from its beginning, for ever, without a group."""

    def poll(self, timeout_s: float = 0.0) -> list[RawRecord]:
        """What came since the last call, in order; blocks at most `timeout_s`."""

    def catch_up(self, timeout_s: float) -> list[RawRecord]:
        """All that stood in the topic when called; raises BrokerUnreachable when that takes longer."""

    def close(self) -> None:
        """Stop reading. May be called twice."""


class Codec(Protocol):
    """Bytes and messages. Pure; decoding raises BadRecord."""

    def decode_request(self, record: RawRecord) -> Request:
        """A request in any of the accepted forms."""

    def decode_sample(self, record: RawRecord) -> Sample:
        """What `encode_sample` wrote."""

    def decode_feedback(self, record: RawRecord) -> Feedback:
        """A late answer."""

    def decode_registry(self, record: RawRecord) -> Registry | None:
        """The registry of a record of the experts topic; None for a manifest or a tombstone."""

    def decode_manifest(self, record: RawRecord) -> ExpertVersion | None:
        """The manifest of a record of the experts topic that is no registry; None for a tombstone."""

    def encode_result(
        self, request: Request, answer: Answer, *, model: str, registry_number: int, latency_ms: float
    ) -> OutboundMessage:
        """The result of a request, keyed like it."""

    def encode_sample(self, sample: Sample) -> OutboundMessage:
        """A sample, keyed by tenant."""

    def encode_event(self, event: Event) -> OutboundMessage:
        """A lifecycle event, keyed by its entity."""

    def encode_dead_letter(self, letter: DeadLetter) -> OutboundMessage:
        """The original bytes with error headers, within the topic's limit."""

    def encode_manifest(self, version: ExpertVersion) -> OutboundMessage:
        """The manifest of an expert's current version, keyed by the expert."""

    def encode_registry(self, registry: Registry) -> OutboundMessage:
        """The registry record."""


class Clock(Protocol):
    """Time, passed in."""

    def now_ms(self) -> int:
        """Wall clock, milliseconds since 1970."""

    def monotonic_s(self) -> float:
        """Never goes back, seconds."""


class CrashJournal(Protocol):
    """A short text that outlives the process however it ends: what it was doing."""

    def read(self) -> str:
        """What was written last, by this process or the one before; empty without it. Never raises."""

    def write(self, text: str) -> None:
        """Instead of what was written before; it need not survive the machine. Never raises: where it cannot be
        written, nothing is remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailure:
    """A part of a registry that is not served: `name` is a version's, or `router`; its old version, if any, stays.

    `may_pass`: preparing the same registry again may succeed, once the store answers or the files are restored.
    """

    name: str
    reason: str
    may_pass: bool


Activation = Callable[[], tuple[LoadFailure, ...]]
"""Serves a prepared registry from the next batch on, whole; called between batches, takes milliseconds. Returns what
could not be loaded."""


class Answerer(Protocol):
    """The model as serve sees it: registry in, answers out. Not thread-safe, but for `prepare`."""

    def prepare(self, registry: Registry) -> Activation:
        """Everything slow about serving a registry: files are read, statistics fitted. May run in another thread while
        `answer` goes on; one at a time, and what it returned is called before the next one begins."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order. Never reads `output`, `skill` or `id`. Raises BadRecord for a single request
        that cannot be answered (the caller bisects)."""

    def score(self, inputs: Sequence[str], tenant: str) -> list[Novelty]:
        """The novelty of texts, without answering them."""


class VectorIndex(Protocol):
    """Nearest neighbours under Euclidean distance, with ids kept over additions and removals."""

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids: (n,) int64, vectors: (n, d) float32."""

    def remove(self, ids: np.ndarray) -> None:
        """Forget these ids; unknown ones are ignored."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(distances (n, k) float32 ascending, ids (n, k) int64, -1 where there are fewer than k)."""

    def __len__(self) -> int: ...


class ExpertStore(Protocol):
    """Folders under content addresses."""

    def put(self, folder: Path) -> StoredFolder:
        """Copy a folder in (aside, then renamed); the same content twice is one entry. Raises DiskFull."""

    def open(self, stored: StoredFolder) -> Path:
        """A local, verified folder to read from. Raises ExpertCorrupt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobUpdate:
    """What a child said of a job: progress in between, then exactly one end (`result` or `error`)."""

    job: str
    progress: Mapping[str, Any] | None = None
    result: Path | None = None
    error: str | None = None


class Child(Protocol):
    """The child process that runs job folders, one at a time."""

    def submit(self, folder: Path) -> None:
        """Start on a job folder; its name is the job's id. Only when `is_idle`."""

    def updates(self) -> list[JobUpdate]:
        """What was said since the last call; never blocks. A child that died ends its job with an error."""

    @property
    def is_idle(self) -> bool:
        """Whether `submit` may be called."""

    def close(self) -> None:
        """Kill what runs. May be called twice."""


IndexFactory = Callable[[int], VectorIndex]  # dimensions → an empty index
