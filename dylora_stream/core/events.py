"""Lifecycle events: their names, and ids that a repeat shares.

An event's id is a digest of what caused it (a position, a job, a boot), so whoever reads uncommitted can drop repeats.
"""

import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from dylora_stream.core.messages import Event

__all__ = ["EventType", "lifecycle_event"]


class EventType(StrEnum):
    """Every lifecycle event; on the wire `dylora.<name>.v1`."""

    SAMPLE_NOVEL = "sample.novel"
    CLUSTER_CREATED = "cluster.created"
    CLUSTER_MERGED = "cluster.merged"
    CLUSTER_AWAITING_LABELS = "cluster.awaiting_labels"
    CLUSTER_HELD_BACK = "cluster.held_back"
    CLUSTER_UNLEARNABLE = "cluster.unlearnable"
    BUFFER_READY = "buffer.ready"
    TRAINING_STARTED = "training.started"
    TRAINING_PROGRESS = "training.progress"
    TRAINING_COMPLETED = "training.completed"
    TRAINING_FAILED = "training.failed"
    EXPERT_SPAWNED = "expert.spawned"
    EXPERT_PROMOTED = "expert.promoted"
    EXPERT_REJECTED = "expert.rejected"
    EXPERT_MATURED = "expert.matured"
    EXPERT_RETIRED = "expert.retired"
    EXPERT_LOAD_FAILED = "expert.load_failed"
    ROUTING_CHANGED = "routing.changed"
    FEEDBACK_UNMATCHED = "feedback.unmatched"
    WORKER_STARTED = "worker.started"
    WORKER_STOPPED = "worker.stopped"


def lifecycle_event(
    kind: EventType, entity: str, cause: str, time_ms: int, data: Mapping[str, Any] | None = None
) -> Event:
    """The event of this kind about this entity; `cause` is what a repeat would share."""
    digest = hashlib.sha256(f"{kind}\0{entity}\0{cause}".encode()).hexdigest()[:32]
    return Event(id=digest, type=kind.value, entity=entity, time_ms=time_ms, data=dict(data or {}))
