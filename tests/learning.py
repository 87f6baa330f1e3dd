"""A curator to play with: rows of kinds that lie far apart, a clock, a ledger, and no model.

A row's text says its kind; features and sketch are a fixed function of the text, so that a job's script can make them.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dylora_stream.core.cluster_config import ClusteringConfig
from dylora_stream.core.clustering import Reference
from dylora_stream.core.events import EventType
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.ledger import Changes, ClusterRecord, JobRecord, LedgerRow
from dylora_stream.core.messages import (
    DEFAULT_TENANT,
    Event,
    Feedback,
    Novelty,
    Policy,
    Position,
    RawRecord,
    Sample,
    SampleReason,
    Topic,
)
from dylora_stream.core.novelty import NoveltyConfig
from dylora_stream.core.statistics import ExpertStatistics
from dylora_stream.learn.curator import Curator, CuratorConfig
from dylora_stream.learn.knowledge import Knowledge
from dylora_stream.learn.lifecycle import LifecycleConfig
from dylora_stream.stream import codec
from dylora_stream.stream.wire import WireCodec
from dylora_stream.testing import ManualClock, MemoryIndex, MemoryLedger

KINDS = ("apple", "bolt", "cloud")
SPACE = "space"
REQUESTS = "dylora.requests"
CODEC = WireCodec(source="/test")
NOVELTY = NoveltyConfig()
CLUSTERING = ClusteringConfig(join_similarity=0.5, reference_rows=100_000)
REFERENCE = Reference(
    input_mean=np.zeros(16, np.float32),
    input_std=np.ones(16, np.float32),
    sketch_mean=np.zeros(8, np.float32),
)
RULES = LifecycleConfig(
    rows_to_seed=30,
    max_seed_rows=60,
    sketch_rows=10,
    sketch_after_s=4.0,
    rows_to_consolidate=20,
    max_consolidate_rows=100,
    rows_to_mature=10,
)


def texts(kind: str, begin: int, end: int) -> list[str]:
    """Distinct inputs of one kind."""
    return [f"{kind} {number}" for number in range(begin, end)]


def features_of(text: str) -> np.ndarray:
    """(16,) float32: far along the kind's own axis, with a little noise."""
    return _around(text, 16, 8.0)


def sketch_of(text: str) -> np.ndarray:
    """(8,) float32, the same for the answer."""
    return _around(text, 8, 4.0)


def _around(text: str, dimensions: int, distance: float) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    vector = 0.3 * rng.standard_normal(dimensions)
    vector[KINDS.index(text.split(maxsplit=1)[0])] += distance
    return vector.astype(np.float32)


def sample(text: str, offset: int, **changes: Any) -> Sample:
    """A labelled, novel record that the backbone answered wrongly, unless told otherwise."""
    novelty = Novelty(score=1.0, p_value=None, entropy=0.0, nearest=None, is_novel=True)
    values: dict[str, Any] = {
        "position": Position(REQUESTS, 0, offset),
        "id": f"id-{offset}",
        "tenant": DEFAULT_TENANT,
        "input": text,
        "output": text.upper(),
        "choices": (),
        "reason": SampleReason.NOVEL,
        "timestamp_ms": 1_700_000_000_000,
        "answer": "wrong",
        "policy": Policy.BACKBONE,
        "expert": None,
        "version": 0,
        "novelty": novelty,
        "feature_space": SPACE,
        "features": features_of(text),
    }
    return Sample(**values | changes)


def told(changes: Changes, kind: EventType) -> list[Event]:
    """The events of one kind among the messages, read back from their bytes."""
    found = [message for message in changes.messages if message.topic is Topic.EVENTS]
    nowhere = Position("events", 0, 0)
    records = [RawRecord(position=nowhere, key=m.key, value=m.value, headers=m.headers) for m in found]
    return [event for event in map(codec.decode_event, records) if event.type == kind]


class Desk:
    """A curator at work: what it decides is committed to a ledger, jobs are done by hand."""

    def __init__(self, rules: LifecycleConfig = RULES, slots: int = 32) -> None:
        self.ledger, self.clock, self.rules = MemoryLedger(), ManualClock(), rules
        self.slots = slots
        self.statistics: dict[str, ExpertStatistics] = {}
        self._offset = 0
        self.reopen()

    def reopen(self) -> None:
        """Another curator, from what the ledger has."""
        knowledge = Knowledge(lambda version: self.statistics[version.storage.sha256], MemoryIndex, NOVELTY)
        config = CuratorConfig(lifecycle=self.rules, clustering=CLUSTERING, slots=self.slots)
        self.curator = Curator(
            self.ledger.load(self.rules.expert_texts), knowledge, CODEC, self.clock, config
        )
        self.curator.refer_to(REFERENCE)

    def take(self, inputs: Iterable[str], **changes: Any) -> Changes:
        """Samples of these texts, sent now, at the next offsets."""
        samples = []
        for text in inputs:
            samples.append(sample(text, self._offset, timestamp_ms=self.clock.now_ms(), **changes))
            self._offset += 1
        return self.commit(self.curator.take(samples, [], {(REQUESTS, 0): self._offset}))

    def hear(self, *feedback: Feedback) -> Changes:
        """Late answers."""
        return self.commit(self.curator.take([], feedback, {}))

    def commit(self, changes: Changes) -> Changes:
        """As the loop does."""
        self.ledger.commit(changes)
        return changes

    def start(self) -> JobRecord:
        """The next job, begun."""
        request = self.curator.next_job()
        assert request is not None
        job_id = f"{request.kind}-{len(self.ledger._jobs)}"
        return self.commit(self.curator.start(request, job_id)).jobs[job_id]

    def sketch(self) -> Changes:
        """A sketch job from beginning to end."""
        job = self.start()
        rows = {row.position: row for row in self.rows}
        sketches = {position: sketch_of(rows[position].input) for position in job.positions}
        return self.commit(self.curator.sketched(job, sketches))

    def gather(self, inputs: Sequence[str], **changes: Any) -> None:
        """Rows into clusters."""
        self.take(inputs, **changes)
        self.clock.advance(self.rules.sketch_after_s)
        self.sketch()

    def promote(self, job: JobRecord) -> Changes:
        """The job's check let its expert through."""
        served = self.curator.registry.expert(job.expert_id or "")
        version = ExpertVersion(
            expert_id=job.expert_id or "",
            skill_id="s",
            version=job.version,
            parent=served.version if served else None,
            storage=StoredFolder(path=job.job_id, sha256=job.job_id),
            maturity=served.maturity if served else Maturity.NASCENT,
            tenant=job.tenant,
            trained_on={"job": job.job_id},
        )
        rows = {row.position: row.features for row in self.rows}
        trained = np.stack([rows[position] for position in job.positions])
        self.statistics[job.job_id] = ExpertStatistics(
            expert_id=version.expert_id, rows=trained, tenant=version.tenant
        )
        registry = self.curator.registry.with_expert(version)
        return self.end(job, "promoted", registry=registry)

    def end(self, job: JobRecord, decision: str, *, registry: Registry | None = None, **more: Any) -> Changes:
        """The job's report came back."""
        return self.commit(self.curator.trained(job, {"decision": decision, **more}, registry))

    def grow_expert(self, kind: str, begin: int = 0, **changes: Any) -> str:
        """An expert of one kind, live; its id."""
        self.gather(texts(kind, begin, begin + self.rules.rows_to_seed), **changes)
        job = self.start()
        self.promote(job)
        return job.expert_id or ""

    @property
    def rows(self) -> tuple[LedgerRow, ...]:
        """All rows, as committed."""
        return self.ledger.load().rows

    @property
    def clusters(self) -> tuple[ClusterRecord, ...]:
        """All clusters, as committed."""
        return self.ledger.load().clusters

    def of(self, kind: str) -> list[LedgerRow]:
        """The rows of one kind."""
        return [row for row in self.rows if row.input.startswith(kind)]
