"""A worker that answers every request with its own value, for test_exactly_once.py; a process that can be killed.

Arguments: bootstrap servers, prefix, instance, and the number of the transaction in which to stop before its
offsets are sent (0: never). It prints `stalled` there, `refused` when a transaction failed, and `idle` when a poll
brought nothing.
"""

import sys
from collections.abc import Sequence

from kafka import KafkaProducer
from kafka.producer.future import FutureRecordMetadata

from dylora_stream.core.errors import TransactionAborted
from dylora_stream.core.messages import OutboundMessage, Topic
from dylora_stream.core.ports import Batch, Checkpoint
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.sink import KafkaSink
from dylora_stream.stream.source import KafkaSource

BATCH_RECORDS = 10


def answers(batch: Batch) -> list[OutboundMessage]:
    """A result a record, headed with the position it answers."""
    return [
        OutboundMessage(
            topic=Topic.RESULTS,
            key=record.key,
            value=record.value,
            headers=(("position", str(record.position).encode()),),
        )
        for record in batch.records
    ]


class StallingSink(KafkaSink):
    """Stops in a chosen transaction between steps 5 and 6, with all results on the broker, until it gets a line."""

    def __init__(self, config: KafkaConfig, transactional_id: str, *, stall_at: int) -> None:
        super().__init__(config, transactional_id)
        self._left = stall_at

    def _transact(
        self, producer: KafkaProducer, messages: Sequence[OutboundMessage], checkpoint: Checkpoint | None
    ) -> None:
        self._left -= 1
        self._last = messages[-1] if self._left == 0 else None
        super()._transact(producer, messages, checkpoint)

    def _send(self, producer: KafkaProducer, message: OutboundMessage) -> FutureRecordMetadata:
        sent = super()._send(producer, message)
        if message is self._last:
            producer.flush(timeout=10)
            print("stalled", flush=True)  # noqa: T201 - the test reads it
            sys.stdin.readline()
        return sent


def main(servers: str, prefix: str, instance: str, stall_at: int) -> None:
    """Answer until killed."""
    config = KafkaConfig(
        bootstrap_servers=servers, prefix=prefix, group=prefix + "group", instance=instance, session_timeout_s=6.0,
        connect_timeout_s=10.0, request_timeout_s=10.0, transaction_timeout_s=10.0,
    )  # fmt: skip
    sink = StallingSink(config, f"{prefix}{instance}.serve", stall_at=stall_at)
    source = KafkaSource(config, [Topic.REQUESTS], witness=Topic.RESULTS)
    while True:
        batch = source.poll(BATCH_RECORDS, 0.5)
        if not batch:
            print("idle", flush=True)  # noqa: T201 - the test reads it
            continue
        try:
            sink.publish(answers(batch), batch.checkpoint)
        except TransactionAborted:
            print("refused", flush=True)  # noqa: T201 - the test reads it
            source.rewind()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
