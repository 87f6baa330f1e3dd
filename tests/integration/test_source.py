"""The source on a broker whose group moves on, or which is slow, between two of its questions."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from kafka.coordinator.base import MemberState
from kafka.errors import IllegalStateError, KafkaError, KafkaTimeoutError

from dylora_stream.core.messages import OutboundMessage, Topic
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.sink import KafkaSink
from dylora_stream.stream.source import KafkaSource
from dylora_stream.stream.topics import TopicLayout, ensure_topics

pytestmark = pytest.mark.kafka

PATIENCE_S = 20.0


class TroubledConsumer:
    """A consumer one of whose calls fails: the partition went to another member, or no answer came in time."""

    def __init__(self, consumer: Any, call: str, error: KafkaError) -> None:
        self._consumer, self._call, self._error = consumer, call, error

    def __getattr__(self, name: str) -> Any:
        return self._fail if name == self._call else getattr(self._consumer, name)

    def _fail(self, *_: object, **__: object) -> None:
        raise self._error


@pytest.fixture
def config(broker: str, kafka_config: Callable[..., KafkaConfig]) -> KafkaConfig:
    """Topics and a group of a test's own."""
    return kafka_config(broker)


@pytest.fixture
def source(config: KafkaConfig) -> Iterator[KafkaSource]:
    """A member that owns a topic of three records and has not taken them yet."""
    ensure_topics(config, TopicLayout(requests_partitions=1))
    sink = KafkaSink(config, config.prefix + "asker")
    sink.publish([OutboundMessage(topic=Topic.REQUESTS, key=b"k", value=b"%d" % n) for n in range(3)])
    sink.close()
    source = KafkaSource(config, [Topic.REQUESTS])
    yield source
    source.close()


def take(source: KafkaSource) -> list[bytes | None]:
    """The next records, once there are some."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if batch := source.poll(10, 0.5):
            return [record.value for record in batch.records]
    raise AssertionError("nothing came")


@pytest.mark.parametrize(
    ("call", "error"),
    [("position", IllegalStateError("not assigned")), ("end_offsets", KafkaTimeoutError("slow"))],
)
def test_a_lag_that_cannot_be_read_is_no_number_and_no_error(
    source: KafkaSource, call: str, error: KafkaError
) -> None:
    """A metric never ends a worker; when the trouble is over, it is a number again."""
    assert take(source) == [b"0", b"1", b"2"]
    consumer = source._consumer
    source._consumer = TroubledConsumer(consumer, call, error)
    assert math.isnan(source.lag_records())
    source._consumer = consumer
    assert source.lag_records() == 0


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("committed", KafkaTimeoutError("slow")),
        ("committed", IllegalStateError("not assigned")),
        ("seek", IllegalStateError("not assigned")),
    ],
)
def test_a_rewind_that_fails_is_made_good_before_the_next_record(
    source: KafkaSource, call: str, error: KafkaError
) -> None:
    """The group moves on during an abort: no record is handed out from the wrong position, and none is lost."""
    assert take(source) == [b"0", b"1", b"2"]
    consumer = source._consumer
    source._consumer = TroubledConsumer(consumer, call, error)
    source.rewind()
    assert not source.poll(10, 0.5)
    assert math.isnan(source.lag_records())
    source._consumer = consumer
    assert take(source) == [b"0", b"1", b"2"]


def test_a_member_whose_join_the_client_forgot_joins_again(source: KafkaSource) -> None:
    """So it leaves one that was begun for partitions that were not known for a moment, and outlived a poll: its heart
    does not beat, so that the group gives the member up, and nothing that it answers can be committed."""
    assert len(take(source)) == 3
    coordinator = source._consumer._coordinator
    assert not coordinator.need_rejoin()
    coordinator.state, coordinator.rejoining = MemberState.REBALANCING, True
    coordinator._disable_heartbeat()
    end = time.monotonic() + PATIENCE_S
    while coordinator.rebalance_in_progress():
        assert time.monotonic() < end
        source.poll(10, 0.5)
    assert coordinator._heartbeat_enabled
    assert len(take(source)) == 3


def test_a_member_that_ends_in_its_first_join_holds_up_nobody(
    source: KafkaSource, config: KafkaConfig
) -> None:
    """A worker that is stopped while it starts: the others go on, without waiting for its session to end."""
    assert len(take(source)) == 3
    brief = KafkaSource(replace(config, instance="brief"), [Topic.REQUESTS])
    brief.poll(10, 0.1)
    brief.close()
    sink = KafkaSink(config, config.prefix + "again")
    sink.publish([OutboundMessage(topic=Topic.REQUESTS, key=b"k", value=b"3")])
    sink.close()
    assert take(source)[-1] == b"3"
