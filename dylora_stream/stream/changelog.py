"""Records in, without a group: a reader of whole topics, from their beginning and for ever."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from dylora_stream.core.errors import BrokerUnreachable, TopicMissing
from dylora_stream.core.messages import RawRecord, Topic
from dylora_stream.stream.kafka import KafkaConfig, connect, consumer_options, kafka_errors
from dylora_stream.stream.pacing import poll
from dylora_stream.stream.raw import in_order
from dylora_stream.stream.source import CLOSE_S

__all__ = ["KafkaChangelog"]


class KafkaChangelog:
    """Topics read whole and for ever, without a group (core.ports.Changelog); in order within each partition."""

    def __init__(self, config: KafkaConfig, *topics: Topic) -> None:
        self._config = config
        names = [config.topic(topic) for topic in topics or (Topic.EXPERTS,)]
        self._name = ", ".join(names)
        options = consumer_options(config, "changelog", in_group=False)
        self._consumer = connect(lambda: KafkaConsumer(**options), config)
        with kafka_errors(f"looking for {self._name}"):
            missing = set(names) - set(self._consumer.topics())
            if missing:
                self.close()
                raise TopicMissing(
                    f"there is no topic {', '.join(sorted(missing))}; create it with `dylora-stream topics create`"
                )
            self._partitions = [
                TopicPartition(name, number)
                for name in names
                for number in sorted(self._consumer.partitions_for_topic(name) or ())
            ]
            self._consumer.assign(self._partitions)
            self._consumer.seek_to_beginning(*self._partitions)

    def poll(self, timeout_s: float = 0.0) -> list[RawRecord]:
        """See core.ports.Changelog.poll."""
        with kafka_errors(f"reading {self._name}"):
            return list(in_order(poll(self._consumer, timeout_s, is_paced=self._config.is_embedded)))

    def catch_up(self, timeout_s: float) -> list[RawRecord]:
        """See core.ports.Changelog.catch_up."""
        return [record for records in self.to_end(timeout_s) for record in records]

    def to_end(self, timeout_s: float) -> Iterator[list[RawRecord]]:
        """What stands in the topics up to where they end now, as it comes; BrokerUnreachable when none comes for so
        long."""
        with kafka_errors(f"reading {self._name}"):
            ends = self._consumer.end_offsets(self._partitions, timeout_ms=round(timeout_s * 1000))
        last_s = time.monotonic()
        while self._is_before(ends):
            records = self.poll(0.1)
            if records:
                yield records
                last_s = time.monotonic()
            elif time.monotonic() - last_s > timeout_s:
                raise BrokerUnreachable(
                    f"{self._name} could not be read to its end: nothing came for {timeout_s:g} s"
                )

    def close(self) -> None:
        """See core.ports.Changelog.close."""
        with suppress(KafkaError, OSError):
            self._consumer.close(autocommit=False, timeout_ms=round(CLOSE_S * 1000))

    def _is_before(self, ends: Mapping[TopicPartition, int]) -> bool:
        with kafka_errors(f"reading {self._name}"):
            return any(self._position(part) < ends[part] for part in self._partitions)

    def _position(self, partition: TopicPartition) -> int:
        return (
            self._consumer.position(partition, timeout_ms=round(self._config.request_timeout_s * 1000)) or 0
        )
