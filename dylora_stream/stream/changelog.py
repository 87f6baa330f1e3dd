"""Records in, for a reader of whole topics: the compacted experts topic, and whatever is counted or replayed."""

import time
from contextlib import suppress

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from dylora_stream.core.errors import BrokerUnreachable, TopicMissing
from dylora_stream.core.messages import RawRecord, Topic
from dylora_stream.stream.kafka import KafkaConfig, connect, consumer_options, kafka_errors
from dylora_stream.stream.pacing import poll
from dylora_stream.stream.source import in_order

__all__ = ["KafkaChangelog"]

CLOSE_S = 5.0  # for closing the connections


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
        records: list[RawRecord] = []
        end = time.monotonic() + timeout_s
        with kafka_errors(f"reading {self._name}"):
            ends = self._consumer.end_offsets(self._partitions, timeout_ms=round(timeout_s * 1000))
            while any(self._position(part) < ends[part] for part in self._partitions):
                left = end - time.monotonic()
                if left <= 0:
                    raise BrokerUnreachable(
                        f"{self._name} could not be read to its end in {timeout_s:g} s; {len(records)} records came"
                    )
                records.extend(
                    in_order(poll(self._consumer, min(left, 0.1), is_paced=self._config.is_embedded))
                )
        return records

    def close(self) -> None:
        """See core.ports.Changelog.close."""
        with suppress(KafkaError, OSError):
            self._consumer.close(autocommit=False, timeout_ms=round(CLOSE_S * 1000))

    def _position(self, partition: TopicPartition) -> int:
        return (
            self._consumer.position(partition, timeout_ms=round(self._config.request_timeout_s * 1000)) or 0
        )
