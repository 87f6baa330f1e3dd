"""What promises exactly-once, on a real Kafka only: the embedded broker has no time-outs and no generation fencing."""

import dataclasses
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kafka import KafkaProducer
from kafka.producer.future import FutureRecordMetadata

from dylora_stream.core.errors import BrokerUnreachable, Fenced, OffsetsLost, TransactionAborted
from dylora_stream.core.messages import OutboundMessage, RawRecord, Topic
from dylora_stream.core.ports import Batch
from dylora_stream.stream.broker import free_port
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.sink import KafkaSink
from dylora_stream.stream.source import KafkaSource
from dylora_stream.stream.topics import TopicLayout, ensure_topics

pytestmark = [pytest.mark.kafka]

PATIENCE_S = 60.0
WORKER = Path(__file__).with_name("echo_worker.py")


class OvertakenSink(KafkaSink):
    """Something happens in the middle of its first transaction, when a message is on the broker."""

    def __init__(self, config: KafkaConfig, transactional_id: str, happens: Callable[[], object]) -> None:
        super().__init__(config, transactional_id)
        self._happens: Callable[[], object] | None = happens

    def _send(self, producer: KafkaProducer, message: OutboundMessage) -> FutureRecordMetadata:
        sent = super()._send(producer, message)
        happens, self._happens = self._happens, None
        if happens is not None:
            producer.flush(timeout=10)
            happens()
        return sent


@pytest.fixture
def config(real_broker: str, kafka_config: Callable[..., KafkaConfig]) -> KafkaConfig:
    """Topics of its own on a real Kafka."""
    made = kafka_config(real_broker)
    ensure_topics(made, TopicLayout(requests_partitions=2))
    return made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opened."""
    with ExitStack() as opened:
        yield opened


def open_sink(stack: ExitStack, config: KafkaConfig, transactional_id: str) -> KafkaSink:
    """A sink that ends with the test."""
    sink = KafkaSink(config, config.prefix + transactional_id)
    stack.callback(sink.close)
    return sink


def open_source(stack: ExitStack, config: KafkaConfig) -> KafkaSource:
    """A source that ends with the test."""
    source = KafkaSource(config, [Topic.REQUESTS], witness=Topic.RESULTS)
    stack.callback(source.close)
    return source


def ask(sink: KafkaSink, count: int, start: int = 0) -> None:
    """Numbered requests."""
    sink.publish(
        [
            OutboundMessage(topic=Topic.REQUESTS, key=b"%d" % n, value=b"%d" % n)
            for n in range(start, start + count)
        ]
    )


def answers(batch: Batch) -> list[OutboundMessage]:
    """A result a record."""
    return [
        OutboundMessage(topic=Topic.RESULTS, key=record.key, value=record.value) for record in batch.records
    ]


def next_batch(source: KafkaSource, max_records: int = 100) -> Batch:
    """The next batch with records in it."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        batch = source.poll(max_records, 0.5)
        if batch:
            return batch
    raise AssertionError(f"no records in {PATIENCE_S} s")


def results(config: KafkaConfig) -> list[RawRecord]:
    """Every committed result, as a fresh reader sees it."""
    changelog = KafkaChangelog(config, Topic.RESULTS)
    try:
        return changelog.catch_up(PATIENCE_S)
    finally:
        changelog.close()


def start_worker(stack: ExitStack, config: KafkaConfig, *, stall_at: int = 0) -> "subprocess.Popen[str]":
    """An echo worker that ends with the test at the latest."""
    arguments = [config.bootstrap_servers, config.prefix, config.instance, str(stall_at)]
    worker = subprocess.Popen(
        [sys.executable, str(WORKER), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    stack.callback(worker.communicate)
    stack.callback(worker.kill)
    return worker


def hear(worker: "subprocess.Popen[str]", word: str) -> None:
    """Block until the worker says so."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"the worker ended without saying {word}")


def answered(config: KafkaConfig) -> Counter[int]:
    """How often each request was answered."""
    return Counter(int(record.value or b"-1") for record in results(config))


def test_a_failed_transaction_gives_its_records_again_and_its_messages_are_never_seen(
    config: KafkaConfig, stack: ExitStack
) -> None:
    """A stale generation is refused at step 7; offsets of the refused one do not ride along with the next."""
    sink, source = open_sink(stack, config, "serve"), open_source(stack, config)
    ask(sink, 20)
    batch = next_batch(source, 5)
    stale = batch.checkpoint.group._replace(generation_id=batch.checkpoint.group.generation_id + 3)
    with pytest.raises(TransactionAborted):
        sink.publish(answers(batch), dataclasses.replace(batch.checkpoint, group=stale))
    source.rewind()
    taken = 0
    while taken < 20:
        again = next_batch(source, 7)
        taken += len(again.records)
        sink.publish(answers(again), again.checkpoint)
    assert answered(config) == Counter(range(20))


def test_a_fenced_producer_ends_and_loses_nothing(config: KafkaConfig, stack: ExitStack) -> None:
    """The younger process goes on where the older one had committed."""
    sink, source = open_sink(stack, config, "serve"), open_source(stack, config)
    ask(sink, 10)
    batch = next_batch(source, 4)
    sink.publish(answers(batch), batch.checkpoint)
    hanging = next_batch(source, 3)
    younger = open_sink(stack, config, "serve")
    with pytest.raises(Fenced):
        sink.publish(answers(hanging), hanging.checkpoint)
    source.rewind()
    taken = len(batch.records)
    while taken < 10:
        again = next_batch(source)
        taken += len(again.records)
        younger.publish(answers(again), again.checkpoint)
    assert answered(config) == Counter(range(10))


def test_a_producer_fenced_inside_its_transaction_ends_too(config: KafkaConfig, stack: ExitStack) -> None:
    """The younger one starts when the older one's messages are on the broker; those are aborted, not published."""
    asker, source = open_sink(stack, config, "asker"), open_source(stack, config)
    ask(asker, 5)
    batch = next_batch(source)
    older = OvertakenSink(config, config.prefix + "serve", lambda: open_sink(stack, config, "serve"))
    stack.callback(older.close)
    with pytest.raises(Fenced):
        older.publish(answers(batch), batch.checkpoint)
    assert answered(config) == Counter()
    assert source.committed_notes() == frozenset()


def test_rewinding_takes_the_committed_offset_and_not_the_batch_s_first(
    config: KafkaConfig, stack: ExitStack
) -> None:
    """Another producer commits further offsets of the group in between; the source follows the broker."""
    sink, source = open_sink(stack, config, "serve"), open_source(stack, config)
    ask(sink, 10)
    batch = next_batch(source)
    while len(batch.records) < 1:
        batch = next_batch(source)
    partition, end = next(iter(batch.checkpoint.offsets.items()))
    half = dataclasses.replace(batch.checkpoint, offsets={partition: end - 1})
    open_sink(stack, config, "other").publish([], half)
    source.rewind()
    again = next_batch(source)
    firsts = {(r.position.topic, r.position.partition): r.position.offset for r in reversed(again.records)}
    assert firsts[partition] == end - 1


def test_a_worker_killed_in_the_middle_of_a_transaction_loses_and_repeats_nothing(
    config: KafkaConfig, stack: ExitStack
) -> None:
    """kill -9 after the results were sent and before the offsets were; the next process has the same instance id."""
    asker = open_sink(stack, config, "asker")
    ask(asker, 100)
    for stall_at in (2, 1, 3):
        worker = start_worker(stack, config, stall_at=stall_at)
        hear(worker, "stalled")
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    last = start_worker(stack, config)
    ask(asker, 20, start=100)
    end = time.monotonic() + PATIENCE_S
    while sum(answered(config).values()) < 120 and time.monotonic() < end:
        hear(last, "idle")
    assert answered(config) == Counter(range(120))


def test_a_worker_stopped_past_its_session_and_its_transaction_repeats_nothing(
    config: KafkaConfig, stack: ExitStack
) -> None:
    """SIGSTOP inside a transaction until another member owns its partitions; it must not commit when it wakes."""
    asker = open_sink(stack, config, "asker")
    ask(asker, 40)
    zombie = start_worker(stack, config, stall_at=2)
    hear(zombie, "stalled")
    zombie.send_signal(signal.SIGSTOP)
    heir = start_worker(stack, dataclasses.replace(config, instance="1"))
    end = time.monotonic() + PATIENCE_S
    while sum(answered(config).values()) < 40 and time.monotonic() < end:
        hear(heir, "idle")
    zombie.send_signal(signal.SIGCONT)
    assert zombie.stdin is not None
    zombie.stdin.write("go on\n")
    assert zombie.wait(PATIENCE_S) != 0
    hear(heir, "idle")
    assert answered(config) == Counter(range(40))


def test_offsets_that_were_deleted_stop_the_worker_until_told_where_to_start(
    config: KafkaConfig, stack: ExitStack
) -> None:
    """A group that has worked before and has no offsets is not a first start."""
    ask(open_sink(stack, config, "asker"), 3)
    open_sink(stack, config, "serve").publish([OutboundMessage(topic=Topic.RESULTS, key=b"k", value=b"1")])
    lost = open_source(stack, config)
    with pytest.raises(OffsetsLost, match="start_from"):
        next_batch(lost)
    lost.close()
    told = open_source(stack, dataclasses.replace(config, start_from="earliest"))
    assert min(int(record.value or b"") for record in next_batch(told).records) == 0


def test_a_broker_that_is_not_there_is_said_so_after_the_configured_wait(
    kafka_config: Callable[..., KafkaConfig],
) -> None:
    """The message names the address and what to do."""
    config = kafka_config(f"127.0.0.1:{free_port()}", connect_timeout_s=0.5)
    with pytest.raises(BrokerUnreachable, match=r"dylora-stream broker"):
        KafkaSink(config, "nobody")
