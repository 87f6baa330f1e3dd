"""Messages and input offsets out, in one transaction.

Steps 4 to 8 of the transaction that `source` begins (the numbers are the design's, and stand in the body):

    4  begin
    5  send
    6  flush, and look at every future: the client's commit can return without an error after a batch was lost
    7  send the offsets with the group's metadata of step 1, so that a member of an old generation is refused
    8  commit

On *any* error the producer is thrown away and another one is built with the same id, which aborts what hangs. Going on
with the old one is not safe: it keeps the offsets of a refused step 7 and sends them with its next transaction.

The client's calls of steps 7 and 8 have no time-out; here each one gets the transaction's. A commit that ran into it
may have happened: the committed offsets and notes, read after the rewind, are the truth.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import Protocol

import structlog
from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.producer.future import FutureRecordMetadata
from kafka.structs import OffsetAndMetadata

from dylora_stream.core.errors import BrokerError, Fenced, TopicMissing, TransactionAborted
from dylora_stream.core.messages import OutboundMessage
from dylora_stream.core.ports import Checkpoint
from dylora_stream.stream.kafka import KafkaConfig, client_options, connect, kafka_errors, translate

__all__ = ["FixedId", "KafkaSink", "TransactionalIds"]

BATCH_BYTES = 256 * 1024  # of the producer; results of one batch go out together

log = structlog.get_logger(__name__)


class TransactionalIds(Protocol):
    """Which transactional id a producer uses."""

    def previous(self) -> str | None:
        """An id that an earlier producer used and that has to be initialised, once, to abort what it left."""

    def take(self) -> str:
        """The id of the next producer."""


class FixedId:
    """One id for ever: what Kafka is made for."""

    def __init__(self, transactional_id: str) -> None:
        self._id = transactional_id

    def previous(self) -> str | None:
        """None: taking the same id aborts what hangs."""
        return None

    def take(self) -> str:
        """The id."""
        return self._id


class KafkaSink:
    """A transactional producer (core.ports.Sink). `ids` is a transactional id, or a choice of them (`broker`)."""

    def __init__(self, config: KafkaConfig, ids: str | TransactionalIds) -> None:
        self._config = config
        self._ids = FixedId(ids) if isinstance(ids, str) else ids
        self._is_closed = False
        self._producer: KafkaProducer | None = self._build()

    def publish(self, messages: Sequence[OutboundMessage], checkpoint: Checkpoint | None = None) -> None:
        """See core.ports.Sink.publish."""
        if self._is_closed or self._producer is None:
            raise BrokerError("this sink is closed")
        if not messages and (checkpoint is None or not checkpoint.offsets):
            return
        if checkpoint is not None and checkpoint.offsets and checkpoint.group is None:
            raise TransactionAborted(
                "offsets without a group: this member has no generation yet, nothing was sent"
            )
        try:
            self._transact(self._producer, messages, checkpoint)
        except Exception as error:
            ours = translate(error, "a transaction")
            log.warning("transaction_aborted", cause=str(error), kind=type(error).__name__)
            self._replace(ours)
            if isinstance(ours, Fenced | TopicMissing) or type(ours) is BrokerError:
                raise ours from error
            raise TransactionAborted(str(ours)) from error

    def close(self) -> None:
        """See core.ports.Sink.close."""
        self._is_closed = True
        self._discard()

    def _transact(
        self, producer: KafkaProducer, messages: Sequence[OutboundMessage], checkpoint: Checkpoint | None
    ) -> None:
        timeout_s = self._config.transaction_timeout_s
        producer.begin_transaction()  # 4
        sent = [self._send(producer, message) for message in messages]  # 5
        producer.flush(timeout=timeout_s)  # 6
        for future in sent:
            future.get(timeout=timeout_s)
        if checkpoint is not None and checkpoint.offsets:
            offsets = {
                TopicPartition(*partition): OffsetAndMetadata(offset, checkpoint.note, -1)
                for partition, offset in checkpoint.offsets.items()
            }
            _bounded(lambda: producer.send_offsets_to_transaction(offsets, checkpoint.group), timeout_s)  # 7
        _bounded(producer.commit_transaction, timeout_s)  # 8

    def _send(self, producer: KafkaProducer, message: OutboundMessage) -> FutureRecordMetadata:
        value = b"" if message.key is None and message.value is None else message.value
        return producer.send(
            self._config.topic(message.topic), value=value, key=message.key, headers=list(message.headers)
        )

    def _build(self) -> KafkaProducer:
        """A producer whose transactions are initialised: what one before it left open is aborted."""
        left = self._ids.previous()
        if left is not None:
            self._initialised(left).close(timeout=0)
        return self._initialised(self._ids.take())

    def _initialised(self, transactional_id: str) -> KafkaProducer:
        options = client_options(self._config, "sink") | {
            "transactional_id": transactional_id,
            "transaction_timeout_ms": round(self._config.transaction_timeout_s * 1000),
            "delivery_timeout_ms": round(
                max(self._config.transaction_timeout_s, self._config.request_timeout_s) * 1000
            ),
            "max_block_ms": round(
                max(self._config.transaction_timeout_s, self._config.request_timeout_s) * 1000
            ),
            "max_request_size": self._config.max_message_bytes,
            "batch_size": BATCH_BYTES,
            "compression_type": self._config.compression,
            "allow_auto_create_topics": False,
        }
        producer = connect(lambda: KafkaProducer(**options), self._config)
        try:
            with kafka_errors(f"initialising transactions of {transactional_id}"):
                producer.init_transactions()
        except BaseException:
            producer.close(timeout=0)
            raise
        return producer

    def _replace(self, error: BrokerError) -> None:
        self._discard()
        if not isinstance(error, Fenced):
            self._producer = self._build()

    def _discard(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KafkaError, OSError):
                producer.close(timeout=0)


def _bounded(call: Callable[[], None], timeout_s: float) -> None:
    """Run a call that has no time-out of its own; KafkaTimeoutError when it takes longer."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - it is raised in the calling thread
            failures.append(error)

    thread = Thread(target=run, name="dylora-transaction", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise KafkaTimeoutError(f"no answer within {timeout_s:g} s")
    if failures:
        raise failures[0]
