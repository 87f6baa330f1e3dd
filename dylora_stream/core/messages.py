"""What travels over Kafka, as values: records in, requests, answers, results, samples, events, dead letters.

Bytes are `stream.codec`'s business; here is only what the fields mean. Positions are written `topic:partition:offset`
wherever a message carries one: a reader can compare, sort and look them up without a schema.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

__all__ = [
    "DEFAULT_TENANT", "Answer", "DeadLetter", "Event", "Feedback", "Novelty", "OutboundMessage", "Policy", "Position",
    "RawRecord", "Request", "RoutingWeight", "Sample", "SampleReason", "Topic", "is_right",
]  # fmt: skip

DEFAULT_TENANT = "default"

Headers = tuple[tuple[str, bytes], ...]


class Topic(StrEnum):
    """The logical topics; the name on the broker is `prefix` + this, unless configured."""

    REQUESTS = "requests"
    RESULTS = "results"
    EVENTS = "events"
    FEEDBACK = "feedback"
    SAMPLES = "samples"
    EXPERTS = "experts"
    DEAD_LETTERS = "dead-letters"


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where a record stands: the broker's topic name, partition, offset."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}:{self.partition}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        """The position written as `topic:partition:offset`; ValueError if it is not one."""
        topic, partition, offset = text.rsplit(":", 2)
        return cls(topic, int(partition), int(offset))


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRecord:
    """One record as the broker gave it."""

    position: Position
    key: bytes | None = None
    value: bytes | None = None
    headers: Headers = ()
    timestamp_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundMessage:
    """One message to send; value None is a tombstone."""

    topic: Topic
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A record to answer. `output`, when given, is a teaching example and never touches the answer or the route."""

    position: Position
    input: str
    key: bytes | None = None
    id: str | None = None
    output: str | None = None
    choices: tuple[str, ...] = ()
    tenant: str = DEFAULT_TENANT
    skill: str | None = None
    traceparent: str | None = None
    timestamp_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """The right answer, late, for the request at `position` or with `id`."""

    position: Position | None
    id: str | None
    output: str
    tenant: str = DEFAULT_TENANT
    timestamp_ms: int = 0

    @property
    def target(self) -> str:
        """The request that it is for; the position counts where both are named."""
        return f"{self.tenant} id {self.id}" if self.position is None else f"{self.tenant} at {self.position}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingWeight:
    """One expert's share of a row; expert None is the backbone, the permanent null expert."""

    expert: str | None
    version: int
    weight: float


class Policy(StrEnum):
    """How a row was answered."""

    BACKBONE = "backbone"  # by the bare backbone: no expert fits, or none exists
    DENSE = "dense"  # shared: a nascent expert with established ones or the backbone
    SPARSE = "sparse"  # by one mature expert alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Novelty:
    """How new an input is; higher score = more novel.

    `p_value` is None while nothing is calibrated; then every input may found a cluster. `entropy` is the router's, in
    nats; `nearest` is the id of the nearest expert.
    """

    score: float
    p_value: float | None
    entropy: float
    nearest: str | None
    is_novel: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model made of one request. `features`: (d,) float32, a fixed function of backbone and text."""

    output: str
    policy: Policy
    weights: tuple[RoutingWeight, ...]
    novelty: Novelty
    features: np.ndarray

    @property
    def expert(self) -> RoutingWeight | None:
        """The expert with the largest share, or None where the backbone has it."""
        best = max(self.weights, key=lambda weight: weight.weight, default=None)
        return best if best is not None and best.expert is not None else None


def is_right(answer: str, output: str) -> bool:
    """Whether an answer equals the right one, blanks at the ends aside."""
    return answer.strip() == output.strip()


class SampleReason(StrEnum):
    """Why a record was kept for learning."""

    NOVEL = "novel"
    TEACHING = "teaching"
    SHARE = "share"  # hash-sampled from the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A record on its way to learn: text, answer given, novelty, and input features ((d,) float32)."""

    position: Position
    id: str | None
    tenant: str
    input: str
    output: str | None
    choices: tuple[str, ...]
    reason: SampleReason
    timestamp_ms: int
    answer: str
    policy: Policy
    expert: str | None
    version: int
    novelty: Novelty
    feature_space: str
    features: np.ndarray = field(repr=False)

    @property
    def is_correct(self) -> bool | None:
        """Whether the answer given is the right one; None without a right one."""
        return None if self.output is None else is_right(self.answer, self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, past tense. `id` derives from position, job or boot: a repeat has the same id."""

    id: str
    type: str
    entity: str
    time_ms: int
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A record that could not be answered, with where and why."""

    record: RawRecord
    stage: str
    reason: str
    message: str
    attempts: int = 1
    is_cut: bool = False  # read back, and only the head of the value was kept
