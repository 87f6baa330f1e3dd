"""Kafka in memory: a broker, a source, a sink, a changelog, and a clock that moves when told to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dylora_stream.core.errors import Fenced, OffsetsLost, TransactionAborted
from dylora_stream.core.messages import (
    Headers,
    OutboundMessage,
    Position,
    RawRecord,
    Topic,
)
from dylora_stream.core.ports import Batch, Checkpoint, OwnPositions, Partition

__all__ = ["ManualClock", "MemoryBroker", "MemoryChangelog", "MemoryJournal", "MemorySink", "MemorySource"]

DEFAULT_PREFIX = "dylora."

# ---- time ----


class ManualClock:
    """Time that moves when told to (core.ports.Clock)."""

    def __init__(self, start_ms: int = 1_700_000_000_000) -> None:
        self._start_ms = start_ms
        self._elapsed_ms = 0

    def now_ms(self) -> int:
        """Wall clock, milliseconds since 1970."""
        return self._start_ms + self._elapsed_ms

    def monotonic_s(self) -> float:
        """Seconds since this clock was made."""
        return self._elapsed_ms / 1000

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        if seconds < 0:
            raise ValueError("time does not go back")
        self._elapsed_ms += round(seconds * 1000)


# ---- journal ----


@dataclass(slots=True)
class MemoryJournal:
    """What a process that was never ended was doing (core.ports.CrashJournal)."""

    text: str = ""

    def read(self) -> str:
        """See the port."""
        return self.text

    def write(self, text: str) -> None:
        """See the port."""
        self.text = text


# ---- broker ----


@dataclass(slots=True)
class _Group:
    generation: int = 0
    owner: "MemorySource | None" = None
    committed: dict[Partition, tuple[int, str]] = field(default_factory=dict)


class MemoryBroker:
    """Topics as lists of records a partition; groups with one owner, the newest member."""

    def __init__(
        self, partitions: Mapping[Topic, int] | None = None, *, prefix: str = DEFAULT_PREFIX
    ) -> None:
        self._prefix = prefix
        self.groups: dict[str, _Group] = {}
        self.producers: dict[str, int] = {}
        counts = dict(partitions or {})
        self.logs: dict[Partition, list[RawRecord]] = {
            (self.name(topic), number): [] for topic in Topic for number in range(counts.get(topic, 1))
        }

    def name(self, topic: Topic) -> str:
        """The broker's name of a topic."""
        return self._prefix + topic.value

    def partitions(self, topic: str) -> list[Partition]:
        """The partitions of a topic, in order."""
        return sorted(partition for partition in self.logs if partition[0] == topic)

    def append(
        self,
        topic: Topic,
        value: bytes | None,
        key: bytes | None = None,
        headers: Headers = (),
        timestamp_ms: int = 0,
    ) -> Position:
        """Add a record; the key chooses the partition, records without one go to the shortest."""
        partitions = self.partitions(self.name(topic))
        if key is None:
            chosen = min(partitions, key=lambda partition: len(self.logs[partition]))
        else:
            chosen = partitions[sum(key) % len(partitions)]
        position = Position(*chosen, len(self.logs[chosen]))
        record = RawRecord(
            position=position, key=key, value=value, headers=headers, timestamp_ms=timestamp_ms
        )
        self.logs[chosen].append(record)
        return position

    def records(self, topic: Topic) -> list[RawRecord]:
        """All records of a topic, partition by partition."""
        return [record for partition in self.partitions(self.name(topic)) for record in self.logs[partition]]

    def group(self, name: str) -> _Group:
        """A consumer group, made when it is first asked for."""
        return self.groups.setdefault(name, _Group())


# ---- source, sink, changelog ----


class MemorySource:
    """The owner of all partitions of its topics (core.ports.Source), until another one joins its group."""

    def __init__(
        self,
        broker: MemoryBroker,
        topics: Sequence[Topic],
        *,
        group: str = "dylora.serve",
        own: OwnPositions | None = None,
        start_from: Literal["earliest", "latest"] | None = None,
    ) -> None:
        self._broker, self._name, self._own = broker, group, own
        self._start_from = start_from
        self._partitions = [each for topic in topics for each in broker.partitions(broker.name(topic))]
        self._group = broker.group(group)
        self._group.generation += 1
        self._group.owner = self
        self._generation = self._group.generation
        self._next: dict[Partition, int] = {}
        self.rewind()

    def poll(self, max_records: int, timeout_s: float) -> Batch:  # noqa: ARG002 - the port's
        """See core.ports.Source.poll; never waits."""
        if self._group.owner is not self:
            return Batch()
        restarted = self._restart_lost()
        taken: list[RawRecord] = []
        offsets: dict[Partition, int] = {}
        for partition in self._partitions:
            start = self._next[partition]
            records = self._broker.logs[partition][start : start + max_records - len(taken)]
            if records:
                taken.extend(records)
                self._next[partition] = offsets[partition] = start + len(records)
        return Batch(
            records=tuple(taken),
            checkpoint=Checkpoint(offsets=offsets, group=(self._name, self._generation)),
            restarted=restarted,
        )

    def rewind(self) -> None:
        """See core.ports.Source.rewind."""
        own = self._own.positions() if self._own is not None else None
        self._unproved = dict(self._own.stamps()) if self._own is not None else {}
        for partition in self._partitions:
            committed = self._group.committed.get(partition, (0, ""))[0]
            self._next[partition] = committed if own is None else own.get(partition, 0)

    def _restart_lost(self) -> dict[Partition, int]:
        """Positions in a topic that was made anew: beyond its end, or behind another record than was taken."""
        ends = {each: len(self._broker.logs[each]) for each in self._partitions}
        lost = {each: end for each, end in ends.items() if self._next[each] > end or self._is_other(each)}
        if lost and self._start_from is None:
            raise OffsetsLost(f"{sorted(lost)} do not hold the position to go on from; set start_from")
        restarted = {each: end if self._start_from == "latest" else 0 for each, end in lost.items()}
        self._next |= restarted
        if self._own is None:
            self._group.committed |= {each: (start, "") for each, start in restarted.items()}
        return restarted

    def _is_other(self, partition: Partition) -> bool:
        stamp, start = self._unproved.pop(partition, None), self._next[partition]
        before = self._broker.logs[partition][max(start - 1, 0) : start]
        return stamp is not None and any(record.timestamp_ms != stamp for record in before)

    def lag_records(self) -> int:
        """See core.ports.Source.lag_records."""
        if self._group.owner is not self:
            return 0
        return sum(len(self._broker.logs[each]) - self._next[each] for each in self._partitions)

    def committed_notes(self) -> frozenset[str]:
        """See core.ports.Source.committed_notes."""
        notes = (self._group.committed.get(each, (0, ""))[1] for each in self._partitions)
        return frozenset(note for note in notes if note)

    def assignment(self) -> frozenset[Partition]:
        """The partitions that this member owns now."""
        return frozenset(self._partitions) if self._group.owner is self else frozenset()

    def close(self) -> None:
        """See core.ports.Source.close."""
        if self._group.owner is self:
            self._group.owner = None
            self._group.generation += 1


class MemorySink:
    """Messages and offsets, all or nothing (core.ports.Sink). A younger sink with the same id fences this one."""

    def __init__(self, broker: MemoryBroker, transactional_id: str = "dylora.0.serve") -> None:
        self._broker, self._id = broker, transactional_id
        self._epoch = broker.producers[transactional_id] = broker.producers.get(transactional_id, -1) + 1
        self._failure: Exception | None = None

    def fail_next(self, error: Exception | None = None) -> None:
        """Let the next transaction abort (with this error)."""
        self._failure = error if error is not None else TransactionAborted("told to fail")

    def publish(self, messages: Sequence[OutboundMessage], checkpoint: Checkpoint | None = None) -> None:
        """See core.ports.Sink.publish."""
        if self._broker.producers[self._id] != self._epoch:
            raise Fenced(f"a younger process uses {self._id}")
        failure, self._failure = self._failure, None
        if failure is None and checkpoint is not None and checkpoint.offsets:
            failure = self._refusal(checkpoint)
        if failure is not None:
            raise failure
        for message in messages:
            value = b"" if message.key is None and message.value is None else message.value
            self._broker.append(message.topic, value, message.key, message.headers)
        if checkpoint is not None and checkpoint.offsets:
            group = self._broker.group(checkpoint.group[0])
            group.committed |= {
                part: (offset, checkpoint.note) for part, offset in checkpoint.offsets.items()
            }

    def close(self) -> None:
        """See core.ports.Sink.close."""

    def _refusal(self, checkpoint: Checkpoint) -> TransactionAborted | None:
        if checkpoint.group is None:
            return TransactionAborted(
                "offsets without a group: this member has no generation yet, nothing was sent"
            )
        name, generation = checkpoint.group
        if self._broker.group(name).generation != generation:
            return TransactionAborted(f"generation {generation} of {name} is over")
        return None


class MemoryChangelog:
    """A topic read whole (core.ports.Changelog)."""

    def __init__(self, broker: MemoryBroker, topic: Topic = Topic.EXPERTS) -> None:
        self._broker, self._topic = broker, topic
        self._seen: dict[Partition, int] = {}

    def poll(self, timeout_s: float = 0.0) -> list[RawRecord]:  # noqa: ARG002 - the port's
        """See core.ports.Changelog.poll; never waits."""
        fresh: list[RawRecord] = []
        for partition in self._broker.partitions(self._broker.name(self._topic)):
            records = self._broker.logs[partition][self._seen.get(partition, 0) :]
            self._seen[partition] = self._seen.get(partition, 0) + len(records)
            fresh.extend(records)
        return fresh

    def catch_up(self, timeout_s: float) -> list[RawRecord]:  # noqa: ARG002 - the port's
        """See core.ports.Changelog.catch_up."""
        return self.poll()

    def close(self) -> None:
        """See core.ports.Changelog.close."""
