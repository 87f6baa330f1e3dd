"""One contract for Source, Sink and Changelog, over memory, the embedded broker, and a real Kafka if there is one."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import pytest

from dylora_stream.core.errors import Fenced, OffsetsLost, TransactionAborted
from dylora_stream.core.messages import OutboundMessage, RawRecord, Topic
from dylora_stream.core.ports import Batch, Changelog, Checkpoint, Partition, Sink, Source
from dylora_stream.stream.broker import EmbeddedIds
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.sink import FixedId, KafkaSink
from dylora_stream.stream.source import KafkaSource
from dylora_stream.stream.topics import TopicLayout, ensure_topics
from dylora_stream.testing import MemoryBroker, MemoryChangelog, MemorySink, MemorySource

PATIENCE_S = 20.0

Edge = Literal["earliest", "latest"]


@dataclass
class Own:
    """A reader's own positions, as a database keeps them."""

    at: dict[Partition, int]
    times: dict[Partition, int] = field(default_factory=dict)

    def positions(self) -> Mapping[Partition, int]:
        """See the port."""
        return self.at

    def stamps(self) -> Mapping[Partition, int]:
        """See the port."""
        return self.times


class Room(Protocol):
    """What makes the three ports on one broker."""

    def name(self, topic: Topic) -> str:
        """The broker's name of a topic."""

    def source(
        self,
        *topics: Topic,
        own: Own | None = None,
        instance: str = "0",
        start_from: Edge | None = None,
    ) -> Source:
        """A member of the test's group."""

    def sink(self, transactional_id: str = "test") -> Sink:
        """A sink with this id."""

    def changelog(self, topic: Topic) -> Changelog:
        """A reader of the topic."""


class MemoryRoom:
    """The ports in memory."""

    def __init__(self) -> None:
        self._broker = MemoryBroker({Topic.REQUESTS: 2})

    def name(self, topic: Topic) -> str:
        """The broker's name of a topic."""
        return self._broker.name(topic)

    def source(
        self,
        *topics: Topic,
        own: Own | None = None,
        instance: str = "0",
        start_from: Edge | None = None,
    ) -> Source:
        """A member of the test's group."""
        return MemorySource(self._broker, topics, own=own, start_from=start_from)

    def sink(self, transactional_id: str = "test") -> Sink:
        """A sink with this id."""
        return MemorySink(self._broker, transactional_id)

    def changelog(self, topic: Topic) -> Changelog:
        """A reader of the topic."""
        return MemoryChangelog(self._broker, topic)


class KafkaRoom:
    """The ports on a broker; what was opened is closed at the end of the test."""

    def __init__(self, config: KafkaConfig, stack: ExitStack, memory: Path | None) -> None:
        self._config, self._stack, self._memory = config, stack, memory
        ensure_topics(config, TopicLayout(requests_partitions=2))

    def name(self, topic: Topic) -> str:
        """The broker's name of a topic."""
        return self._config.topic(topic)

    def source(
        self,
        *topics: Topic,
        own: Own | None = None,
        instance: str = "0",
        start_from: Edge | None = None,
    ) -> Source:
        """A member of the test's group."""
        config = dataclasses.replace(self._config, instance=instance, start_from=start_from)
        source = KafkaSource(config, topics, own=own)
        self._stack.callback(source.close)
        return source

    def sink(self, transactional_id: str = "test") -> Sink:
        """A sink with this id."""
        base = self._config.prefix + transactional_id
        sink = KafkaSink(
            self._config,
            FixedId(base) if self._memory is None else EmbeddedIds(base, self._memory / transactional_id),
        )
        self._stack.callback(sink.close)
        return sink

    def changelog(self, topic: Topic) -> Changelog:
        """A reader of the topic."""
        changelog = KafkaChangelog(self._config, topic)
        self._stack.callback(changelog.close)
        return changelog


@pytest.fixture(
    params=[
        "memory",
        pytest.param("embedded", marks=pytest.mark.kafka),
        pytest.param("real", marks=pytest.mark.kafka),
    ]
)
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    """The ports' makers, a broker each."""
    if request.param == "memory":
        yield MemoryRoom()
        return
    servers = request.getfixturevalue(f"{request.param}_broker")
    make_config = request.getfixturevalue("kafka_config")
    with ExitStack() as stack:
        yield KafkaRoom(make_config(servers), stack, tmp_path if request.param == "embedded" else None)


def ask(sink: Sink, count: int, *, start: int = 0, topic: Topic = Topic.REQUESTS) -> None:
    """Put numbered records on a topic."""
    sink.publish(
        [OutboundMessage(topic=topic, key=b"k%d" % n, value=b"%d" % n) for n in range(start, start + count)]
    )


def take(source: Source, count: int, max_records: int = 100) -> list[Batch]:
    """Batches until `count` records came; no commit in between."""
    batches: list[Batch] = []
    end = time.monotonic() + PATIENCE_S
    while sum(len(batch.records) for batch in batches) < count:
        assert time.monotonic() < end, f"{batches} after {PATIENCE_S} s"
        batch = source.poll(max_records, 0.5)
        if batch:
            batches.append(batch)
    return batches


def values(batches: list[Batch]) -> list[int]:
    """The numbers in the records, sorted."""
    return sorted(int(record.value or b"-1") for batch in batches for record in batch.records)


def answers(batch: Batch) -> list[OutboundMessage]:
    """A result a record."""
    return [
        OutboundMessage(topic=Topic.RESULTS, key=record.key, value=record.value) for record in batch.records
    ]


def until(changelog: Changelog, count: int) -> list[RawRecord]:
    """What a tailing reader sees until `count` records came."""
    found: list[RawRecord] = []
    end = time.monotonic() + PATIENCE_S
    while len(found) < count and time.monotonic() < end:
        found.extend(changelog.poll(0.5))
    return found


def stale(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of a generation that never was this member's."""
    group = checkpoint.group
    changed = (
        group._replace(generation_id=group.generation_id + 5)
        if hasattr(group, "_replace")
        else (group[0], -7)
    )
    return dataclasses.replace(checkpoint, group=changed)


def test_a_source_gives_every_record_once_and_in_order(room: Room) -> None:
    """Order holds within a partition, and offsets point behind the last record."""
    ask(room.sink("asker"), 30)
    batches = take(room.source(Topic.REQUESTS), 30, max_records=7)
    assert values(batches) == list(range(30))
    assert all(len(batch.records) <= 7 for batch in batches)
    last: dict[Partition, int] = {}
    for batch in batches:
        for record in batch.records:
            at = (record.position.topic, record.position.partition)
            assert record.position.offset > last.get(at, -1)
            last[at] = record.position.offset
        assert all(batch.checkpoint.offsets[at] == last[at] + 1 for at in batch.checkpoint.offsets)


def test_rewinding_without_a_commit_gives_the_same_records_again(room: Room) -> None:
    """Nothing was committed, so everything comes again."""
    ask(room.sink("asker"), 5)
    source = room.source(Topic.REQUESTS)
    first = values(take(source, 5))
    source.rewind()
    source.rewind()
    assert values(take(source, 5)) == first


def test_rewinding_after_a_commit_goes_on_behind_it(room: Room) -> None:
    """Messages, offsets and note arrive together."""
    sink, source = room.sink(), room.source(Topic.REQUESTS)
    assert source.committed_notes() == frozenset()
    ask(sink, 10)
    for number, batch in enumerate(take(source, 10), start=1):
        sink.publish(answers(batch), dataclasses.replace(batch.checkpoint, note=f"mark-{number}"))
    source.rewind()
    end = time.monotonic() + PATIENCE_S
    while source.lag_records() and time.monotonic() < end:
        assert not source.poll(100, 0.5)
    assert source.lag_records() == 0
    assert source.committed_notes()
    assert all(note.startswith("mark-") for note in source.committed_notes())
    ask(sink, 3, start=10)
    assert values(take(source, 3)) == [10, 11, 12]
    assert sorted(
        int(record.value or b"") for record in room.changelog(Topic.RESULTS).catch_up(PATIENCE_S)
    ) == list(range(10))


def test_a_new_member_goes_on_at_the_committed_offset(room: Room) -> None:
    """Closing leaves the group, and may be done twice."""
    sink, source = room.sink(), room.source(Topic.REQUESTS)
    ask(sink, 6)
    for batch in take(source, 6):
        sink.publish(answers(batch), batch.checkpoint)
    ask(sink, 4, start=6)
    source.close()
    source.close()
    assert values(take(room.source(Topic.REQUESTS, instance="1"), 4)) == [6, 7, 8, 9]


def test_own_positions_decide_where_to_read(room: Room) -> None:
    """Learn's database, and not the committed offset, says what comes next; an unknown partition starts at 0."""
    positions: dict[Partition, int] = {}
    ask(room.sink(), 8, topic=Topic.SAMPLES)
    source = room.source(Topic.SAMPLES, own=Own(positions))
    assert values(take(source, 8)) == list(range(8))
    positions[room.name(Topic.SAMPLES), 0] = 5
    source.rewind()
    assert values(take(source, 3)) == [5, 6, 7]


def until_restarted(source: Source) -> Batch:
    """The batch that says where reading goes on."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        batch = source.poll(100, 0.5)
        if batch.restarted:
            return batch
    raise AssertionError(f"nothing was restarted in {PATIENCE_S} s")


def test_own_positions_that_a_topic_does_not_hold_stop_the_reader(room: Room) -> None:
    """As after the topic was made anew: it says so, and what to set."""
    ask(room.sink(), 3, topic=Topic.SAMPLES)
    source = room.source(Topic.SAMPLES, own=Own({(room.name(Topic.SAMPLES), 0): 50}))
    with pytest.raises(OffsetsLost, match="start_from"):
        take(source, 1)


def test_where_reading_goes_on_instead_is_told_with_the_batch(room: Room) -> None:
    """Of every partition at once; a rewind goes back to the own positions, which the reader has set anew by then."""
    sink = room.sink()
    ask(sink, 3, topic=Topic.SAMPLES)
    ask(sink, 2, start=3, topic=Topic.FEEDBACK)
    samples, feedback = (room.name(Topic.SAMPLES), 0), (room.name(Topic.FEEDBACK), 0)
    positions = {samples: 50, feedback: 70}
    source = room.source(Topic.SAMPLES, Topic.FEEDBACK, own=Own(positions), start_from="earliest")
    batch = until_restarted(source)
    assert batch.restarted == {samples: 0, feedback: 0}
    again = room.source(Topic.SAMPLES, Topic.FEEDBACK, own=Own(positions), start_from="earliest")
    source.close()
    batch = until_restarted(again)
    positions |= batch.restarted
    again.rewind()
    assert values(take(again, 5)) == [0, 1, 2, 3, 4]


def test_reading_may_go_on_at_the_end(room: Room) -> None:
    """With `latest` what is there is skipped."""
    sink = room.sink()
    ask(sink, 3, topic=Topic.SAMPLES)
    samples = (room.name(Topic.SAMPLES), 0)
    source = room.source(Topic.SAMPLES, own=Own({samples: 50}), start_from="latest")
    restarted = until_restarted(source).restarted[samples]
    assert restarted >= 3
    ask(sink, 1, start=9, topic=Topic.SAMPLES)
    assert values(take(source, 1)) == [9]


def test_a_group_that_goes_on_at_the_end_loses_nothing_that_comes_afterwards(room: Room) -> None:
    """Its lost offset is replaced at once: a batch that is not committed comes again, and is not skipped as well."""
    sink, samples = room.sink(), (room.name(Topic.SAMPLES), 0)
    ask(sink, 3, topic=Topic.SAMPLES)
    first = room.source(Topic.SAMPLES)
    batch = take(first, 3)[-1]
    sink.publish([], dataclasses.replace(batch.checkpoint, offsets={samples: 50}))
    first.close()
    source = room.source(Topic.SAMPLES, instance="1", start_from="latest")
    end = time.monotonic() + PATIENCE_S
    while source.lag_records() != 0 and time.monotonic() < end:
        assert not source.poll(100, 0.5).records
    ask(sink, 1, start=9, topic=Topic.SAMPLES)
    assert values(take(source, 1)) == [9]
    source.rewind()
    assert values(take(source, 1)) == [9]


@pytest.mark.parametrize("is_other", [True, False])
def test_another_record_before_the_own_position_is_found_out(room: Room, *, is_other: bool) -> None:
    """The topic was made anew and has grown past it; the record that was taken is not handed out again."""
    ask(room.sink(), 8, topic=Topic.SAMPLES)
    samples = (room.name(Topic.SAMPLES), 0)
    plain = room.source(Topic.SAMPLES, own=Own({}))
    records = [record for batch in take(plain, 8) for record in batch.records]
    plain.close()
    place = records[4].position.offset
    own = Own({samples: place + 1}, {samples: records[4].timestamp_ms + is_other})
    if not is_other:
        source = room.source(Topic.SAMPLES, own=own)
        assert values(take(source, 3)) == [5, 6, 7]
        source.rewind()
        assert values(take(source, 3)) == [5, 6, 7]
        return
    source = room.source(Topic.SAMPLES, own=own)
    with pytest.raises(OffsetsLost, match="start_from"):
        take(source, 1)
    source.close()
    source = room.source(Topic.SAMPLES, own=own, start_from="earliest")
    assert until_restarted(source).restarted == {samples: 0}


def test_two_topics_can_be_read_at_once(room: Room) -> None:
    """Learn reads samples and feedback as one group."""
    sink = room.sink()
    ask(sink, 3, topic=Topic.SAMPLES)
    ask(sink, 2, start=3, topic=Topic.FEEDBACK)
    batches = take(room.source(Topic.SAMPLES, Topic.FEEDBACK), 5)
    assert values(batches) == [0, 1, 2, 3, 4]
    assert {record.position.topic for batch in batches for record in batch.records} == {
        room.name(Topic.SAMPLES), room.name(Topic.FEEDBACK)
    }  # fmt: skip


def test_a_tombstone_and_a_message_without_key_and_value_can_be_sent(room: Room) -> None:
    """The first stays a tombstone, the second becomes an empty value instead of an endless error."""
    sink, changelog = room.sink(), room.changelog(Topic.EXPERTS)
    assert changelog.catch_up(PATIENCE_S) == []
    sink.publish(
        [
            OutboundMessage(topic=Topic.EXPERTS, key=b"e", value=None),
            OutboundMessage(topic=Topic.DEAD_LETTERS, key=None, value=None, headers=(("a", b"b"),)),
        ]
    )
    assert [(record.key, record.value) for record in until(changelog, 1)] == [(b"e", None)]
    dead = room.changelog(Topic.DEAD_LETTERS).catch_up(PATIENCE_S)
    assert [(record.key, record.value, record.headers) for record in dead] == [(None, b"", (("a", b"b"),))]


def test_offsets_without_a_generation_are_refused(room: Room) -> None:
    """A batch that was dropped has no group; committing its offsets must not happen."""
    sink = room.sink()
    with pytest.raises(TransactionAborted):
        sink.publish([], Checkpoint(offsets={(room.name(Topic.REQUESTS), 0): 1}))
    ask(sink, 1)


def test_a_refused_transaction_leaves_nothing_and_the_next_one_works(
    room: Room, request: pytest.FixtureRequest
) -> None:
    """Messages of the aborted transaction are never seen; the sink is ready; the source rewinds."""
    if "embedded" in request.node.name:
        pytest.skip("the embedded broker does not refuse stale generations (no KIP-447)")
    sink, source, results = room.sink(), room.source(Topic.REQUESTS), room.changelog(Topic.RESULTS)
    ask(sink, 4)
    batch = take(source, 4)[0]
    with pytest.raises(TransactionAborted):
        sink.publish(answers(batch), stale(batch.checkpoint))
    source.rewind()
    for again in take(source, 4):
        sink.publish(answers(again), again.checkpoint)
    assert sorted(int(record.value or b"") for record in until(results, 4)) == [0, 1, 2, 3]
    assert results.poll(0.2) == []


def test_a_younger_sink_with_the_same_id_fences_the_older(room: Room) -> None:
    """The older one must end: it raises Fenced and its messages are never seen."""
    older = room.sink("twin")
    ask(older, 1)
    younger = room.sink("twin")
    with pytest.raises(Fenced):
        ask(older, 1, start=1)
    ask(younger, 1, start=2)
    seen = sorted(int(record.value or b"") for record in room.changelog(Topic.REQUESTS).catch_up(PATIENCE_S))
    assert seen == [0, 2]


def test_a_changelog_reads_from_the_beginning_and_then_what_is_new(room: Room) -> None:
    """`catch_up` is all that stood there, `poll` is what came since."""
    sink = room.sink()
    ask(sink, 3, topic=Topic.EXPERTS)
    changelog = room.changelog(Topic.EXPERTS)
    assert [record.position.offset >= 0 for record in changelog.catch_up(PATIENCE_S)] == [True] * 3
    ask(sink, 1, start=3, topic=Topic.EXPERTS)
    assert [record.value for record in until(changelog, 1)] == [b"3"]
    changelog.close()
    changelog.close()
