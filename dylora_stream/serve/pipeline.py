"""One micro-batch: records in, messages out. No I/O; what it returns goes out in one transaction.

A record that cannot be decoded, or that the model cannot answer, becomes a dead letter and the rest goes on: a batch
that fails is halved until the culprit stands alone. Before a record is blamed for what the model raised, the model has
to answer a plain one: a device that fails at everything stops the process and buries nothing. The right answer that a
request may carry (`output`) is taken off before the model sees it, so it can never touch the answer or the route.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dylora_stream.core.errors import BadRecord, DyloraError, ModelError
from dylora_stream.core.events import EventType, lifecycle_event
from dylora_stream.core.messages import (
    Answer,
    DeadLetter,
    OutboundMessage,
    Position,
    RawRecord,
    Request,
    Sample,
    SampleReason,
)
from dylora_stream.core.ports import Answerer, Clock, Codec

__all__ = ["Outcome", "Pipeline", "PipelineConfig", "Serving"]

HASH_RANGE = 2**32
UNANSWERABLE = "unanswerable"  # a dead letter's reason: the model raised
POISON = "poison"  # ... or the process ended
PLAIN_INPUT = "a plain text"  # any model that works has an answer to it


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """What is kept for learning."""

    sample_share: float = (
        0.02  # of the records that are neither novel nor teaching, hashed by position; 0 to 1
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sample_share <= 1:
            raise ValueError(f"sample_share must lie between 0 and 1, not {self.sample_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What results say about who answered: the model's name, the registry's number, the feature space."""

    model: str
    registry_number: int
    feature_space: str


@dataclass(slots=True, kw_only=True)
class Outcome:
    """A batch's messages, and what metrics want to know."""

    messages: list[OutboundMessage] = field(default_factory=list)
    answers: list[tuple[Request, Answer]] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        """What came of later records of the batch."""
        self.messages += other.messages
        self.answers += other.answers
        self.dead_letters += other.dead_letters


class Pipeline:
    """Decode, answer, and say what to publish."""

    def __init__(self, answerer: Answerer, codec: Codec, clock: Clock, config: PipelineConfig) -> None:
        self._answerer = answerer
        self._codec = codec
        self._clock = clock
        self._config = config

    def answer(self, records: Sequence[RawRecord], serving: Serving) -> Outcome:
        """Every record ends as a result or as a dead letter, in order."""
        outcome = Outcome()
        started_s = self._clock.monotonic_s()
        by_position = {record.position: record for record in records}
        requests = [request for record in records if (request := self._decode(record, outcome)) is not None]
        answered = self._answer(requests, by_position, outcome)
        latency_ms = (self._clock.monotonic_s() - started_s) * 1000
        for request, answer in answered:
            outcome.answers.append((request, answer))
            outcome.messages.extend(self._messages(request, answer, serving, latency_ms))
        return outcome

    def bury_poison(self, record: RawRecord, ends: int) -> Outcome:
        """A record that is not tried again: so many processes ended while they answered it."""
        outcome = Outcome()
        error = BadRecord(POISON, f"{ends} processes ended while they answered this record", stage="answer")
        self._bury(record, error, outcome, attempts=ends)
        return outcome

    def _decode(self, record: RawRecord, outcome: Outcome) -> Request | None:
        try:
            return self._codec.decode_request(record)
        except BadRecord as error:
            self._bury(record, error, outcome)
            return None

    def _answer(
        self, requests: Sequence[Request], records: Mapping[Position, RawRecord], outcome: Outcome
    ) -> list[tuple[Request, Answer]]:
        if not requests:
            return []
        try:
            blind = [replace(request, output=None, skill=None) for request in requests]
            return list(zip(requests, self._answerer.answer(blind), strict=True))
        except DyloraError as error:
            if not isinstance(error, BadRecord):
                raise
            failure = error
        except Exception as error:  # noqa: BLE001 - `_blame` tells what is the record's fault from what is not
            failure = BadRecord(UNANSWERABLE, f"the model failed on this record: {error}", stage="answer")
        if len(requests) == 1:
            self._blame(failure, requests[0])
            self._bury(records[requests[0].position], failure, outcome)
            return []
        half = len(requests) // 2
        return [
            *self._answer(requests[:half], records, outcome),
            *self._answer(requests[half:], records, outcome),
        ]

    def _blame(self, failure: BadRecord, request: Request) -> None:
        """Raises ModelError when it is not the record: the model cannot answer a plain one either."""
        if failure.reason != UNANSWERABLE:
            return
        try:
            self._answerer.answer(
                [Request(position=request.position, input=PLAIN_INPUT, tenant=request.tenant)]
            )
        except Exception as error:
            raise ModelError(
                f"the model fails on every record, a plain one too ({error}): check the device and its memory, "
                "then start again; no record was lost"
            ) from error

    def _bury(self, record: RawRecord, error: BadRecord, outcome: Outcome, attempts: int = 1) -> None:
        letter = DeadLetter(
            record=record, stage=error.stage, reason=error.reason, message=str(error), attempts=attempts
        )
        outcome.messages.append(self._codec.encode_dead_letter(letter))
        outcome.dead_letters.append(letter)

    def _messages(
        self, request: Request, answer: Answer, serving: Serving, latency_ms: float
    ) -> list[OutboundMessage]:
        messages = [
            self._codec.encode_result(
                request,
                answer,
                model=serving.model,
                registry_number=serving.registry_number,
                latency_ms=latency_ms,
            )
        ]
        reason = self._reason(request, answer)
        if reason is not None:
            messages.append(
                self._codec.encode_sample(_sample(request, answer, reason, serving.feature_space))
            )
        if answer.novelty.is_novel:
            position = str(request.position)
            data = {"position": position, "tenant": request.tenant, "score": answer.novelty.score}
            event = lifecycle_event(EventType.SAMPLE_NOVEL, position, position, self._clock.now_ms(), data)
            messages.append(self._codec.encode_event(event))
        return messages

    def _reason(self, request: Request, answer: Answer) -> SampleReason | None:
        if answer.novelty.is_novel or answer.novelty.p_value is None:
            return SampleReason.NOVEL
        if request.output is not None:
            return SampleReason.TEACHING
        hashed = zlib.crc32(str(request.position).encode()) / HASH_RANGE
        return SampleReason.SHARE if hashed < self._config.sample_share else None


def _sample(request: Request, answer: Answer, reason: SampleReason, feature_space: str) -> Sample:
    expert = answer.expert
    return Sample(
        position=request.position,
        id=request.id,
        tenant=request.tenant,
        input=request.input,
        output=request.output,
        choices=request.choices,
        reason=reason,
        timestamp_ms=request.timestamp_ms,
        answer=answer.output,
        policy=answer.policy,
        expert=None if expert is None else expert.expert,
        version=0 if expert is None else expert.version,
        novelty=answer.novelty,
        feature_space=feature_space,
        features=answer.features,
    )
