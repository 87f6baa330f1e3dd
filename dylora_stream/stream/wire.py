"""The codec as one object, for the loops: `core.ports.Codec` with its limits and its CloudEvents source bound.

Invariant: decoding a request, a sample or feedback raises BadRecord and nothing else, even where the codec is at fault:
a record whose error nobody expects would end every process that takes it, one after the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dylora_stream.core.errors import BadRecord, DyloraError
from dylora_stream.core.experts import ExpertVersion, Registry
from dylora_stream.core.messages import (
    Answer,
    DeadLetter,
    Event,
    Feedback,
    OutboundMessage,
    RawRecord,
    Request,
    Sample,
)
from dylora_stream.stream import codec

__all__ = ["WireCodec"]

UNDECODABLE = "undecodable"  # a dead letter's reason: the codec raised what it must not


@contextmanager
def _bad_records() -> Iterator[None]:
    """The border: what is raised inside leaves as BadRecord."""
    try:
        yield
    except DyloraError:
        raise
    except Exception as error:
        raise BadRecord(UNDECODABLE, f"unexpected {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class WireCodec:
    """See `core.ports.Codec`."""

    source: str  # CloudEvents source of this worker, a URI
    limits: codec.RecordLimits = field(default_factory=codec.RecordLimits)

    def decode_request(self, record: RawRecord) -> Request:
        """See the port."""
        with _bad_records():
            return codec.decode_request(record, self.limits)

    def decode_sample(self, record: RawRecord) -> Sample:
        """See the port."""
        with _bad_records():
            return codec.decode_sample(record)

    def decode_feedback(self, record: RawRecord) -> Feedback:
        """See the port."""
        with _bad_records():
            return codec.decode_feedback(record, self.limits)

    def decode_registry(self, record: RawRecord) -> Registry | None:
        """See the port."""
        return codec.decode_registry(record) if record.key == codec.REGISTRY_KEY else None

    def decode_manifest(self, record: RawRecord) -> ExpertVersion | None:
        """See the port."""
        return codec.decode_manifest(record)

    def encode_result(
        self, request: Request, answer: Answer, *, model: str, registry_number: int, latency_ms: float
    ) -> OutboundMessage:
        """See the port."""
        return codec.encode_result(
            request, answer, model=model, registry_number=registry_number, latency_ms=latency_ms
        )

    def encode_sample(self, sample: Sample) -> OutboundMessage:
        """See the port."""
        return codec.encode_sample(sample)

    def encode_event(self, event: Event) -> OutboundMessage:
        """See the port."""
        return codec.encode_event(event, source=self.source)

    def encode_dead_letter(self, letter: DeadLetter) -> OutboundMessage:
        """See the port."""
        return codec.encode_dead_letter(letter)

    def encode_manifest(self, version: ExpertVersion) -> OutboundMessage:
        """See the port."""
        return codec.encode_manifest(version)

    def encode_registry(self, registry: Registry) -> OutboundMessage:
        """See the port."""
        return codec.encode_registry(registry)
