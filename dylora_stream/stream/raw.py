"""The client's records as ours."""

from collections.abc import Mapping, Sequence

from kafka import TopicPartition
from kafka.consumer.fetcher import ConsumerRecord

from dylora_stream.core.messages import Position, RawRecord

__all__ = ["in_order", "raw_record"]


def raw_record(record: ConsumerRecord) -> RawRecord:
    """The client's record as ours; a header without a value becomes an empty one."""
    return RawRecord(
        position=Position(record.topic, record.partition, record.offset),
        key=record.key,
        value=record.value,
        headers=tuple((name, value or b"") for name, value in record.headers),
        timestamp_ms=max(0, record.timestamp or 0),
    )


def in_order(polled: Mapping[TopicPartition, Sequence[ConsumerRecord]]) -> tuple[RawRecord, ...]:
    """The records of one poll, partition by partition."""
    return tuple(raw_record(record) for partition in sorted(polled) for record in polled[partition])
