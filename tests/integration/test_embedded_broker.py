"""The embedded broker: it persists, and its gaps are answered where the daemon meets them."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaProducer
from kafka.producer.future import FutureRecordMetadata

from dylora_stream.core.errors import BrokerError
from dylora_stream.core.messages import OutboundMessage, RawRecord, Topic
from dylora_stream.stream.broker import EmbeddedBroker, EmbeddedIds, glibc_problem, is_embedded
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.sink import KafkaSink
from dylora_stream.stream.topics import TopicLayout, ensure_topics

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(glibc_problem() is not None, reason="needs a newer glibc"),
]

PATIENCE_S = 20.0


class PowerCut(Exception):
    """Ends a process between two steps."""


class DyingSink(KafkaSink):
    """Dies in its first transaction, with a message on the broker and the transaction open."""

    def _send(self, producer: KafkaProducer, message: OutboundMessage) -> FutureRecordMetadata:
        super()._send(producer, message)
        producer.flush(timeout=10)
        self._producer = None
        producer.close(timeout=0)
        raise PowerCut

    def _replace(self, error: BrokerError) -> None:
        """A dead process builds nothing."""


def sample(number: int) -> OutboundMessage:
    """A message."""
    return OutboundMessage(topic=Topic.SAMPLES, key=b"t", value=b"%d" % number)


def tail(changelog: KafkaChangelog, count: int) -> list[bytes | None]:
    """What a tailing reader sees."""
    found: list[RawRecord] = []
    end = time.monotonic() + PATIENCE_S
    while len(found) < count and time.monotonic() < end:
        found.extend(changelog.poll(0.5))
    return [record.value for record in found]


def test_what_was_written_is_there_after_a_restart_at_the_same_address(
    tmp_path: Path, kafka_config: Callable[..., KafkaConfig]
) -> None:
    """The demo's broker is stopped and started again."""
    with EmbeddedBroker(tmp_path) as broker:
        config = kafka_config(broker.bootstrap_servers)
        ensure_topics(config, TopicLayout())
        sink = KafkaSink(config, EmbeddedIds("x", tmp_path / "ids"))
        sink.publish([sample(1)])
        sink.close()
        assert is_embedded(broker.bootstrap_servers, tmp_path)
    with EmbeddedBroker(tmp_path) as again:
        assert again.bootstrap_servers == config.bootstrap_servers
        changelog = KafkaChangelog(config, Topic.SAMPLES)
        assert [record.value for record in changelog.catch_up(PATIENCE_S)] == [b"1"]
        changelog.close()


def test_a_tailing_reader_sees_what_is_committed_after_a_process_died_in_a_transaction(
    embedded_broker: str, kafka_config: Callable[..., KafkaConfig], tmp_path: Path
) -> None:
    """A reader that is past the abort: with one id for ever, this broker hides the later commits from it."""
    config = kafka_config(embedded_broker)
    ensure_topics(config, TopicLayout())
    changelog = KafkaChangelog(config, Topic.SAMPLES)
    first = KafkaSink(config, EmbeddedIds("serve", tmp_path / "ids"))
    first.publish([sample(1)])
    first.close()
    assert tail(changelog, 1) == [b"1"]
    dying = DyingSink(config, EmbeddedIds("serve", tmp_path / "ids"))
    with pytest.raises(BrokerError):
        dying.publish([sample(2)])
    after = KafkaSink(config, EmbeddedIds("serve", tmp_path / "ids"))
    assert changelog.poll(1.0) == []
    after.publish([sample(3)])
    after.publish([sample(4)])
    assert tail(changelog, 2) == [b"3", b"4"]
    after.close()
    changelog.close()


def test_a_port_that_is_taken_is_said_so(embedded_broker: str, tmp_path: Path) -> None:
    """Instead of a broker that nobody reaches."""
    with pytest.raises(BrokerError, match="taken"):
        EmbeddedBroker(tmp_path, int(embedded_broker.rpartition(":")[2])).start()


def test_stopping_ends_the_server_and_may_be_done_twice(tmp_path: Path) -> None:
    """The server itself is our child: no wrapper is left behind."""
    broker = EmbeddedBroker(tmp_path)
    broker.start()
    pid = broker.pid
    assert pid is not None
    broker.stop()
    broker.stop()
    assert broker.pid is None
    assert subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode != 0


def test_a_second_broker_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    """The message names the process that serves it."""
    with EmbeddedBroker(tmp_path) as broker, pytest.raises(BrokerError, match=f"process {broker.pid}"):
        EmbeddedBroker(tmp_path).start()
