"""Records in: a member of a consumer group. Who reads a whole topic without one is in `changelog`.

Steps 1 and 2 of the transaction that `sink` ends (the numbers are the design's, and stand in the body):

    1  take the group's metadata, before the poll
    2  poll; when the group's generation changed on the way, drop the batch and rewind

Metadata taken later would let a member that lost its partitions commit what it polled two generations ago: the client
rebalances on its IO thread, between a poll and a commit too. *Rewind* seeks every assigned partition to its committed
offset, read from the broker; the batch's first offset may belong to another owner by now. With `positions` the reader's
own positions take the place of the committed offsets; where a topic does not hold them, the batch says where reading
goes on instead. A topic that was made anew may have grown past them: so reading starts with the record before, which
must have the time of the one that was taken there, and is not handed out again.

Invariant: no record is handed out before its generation's partitions were settled at the position to go on from.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import structlog
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import MemberToRemove
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import (
    CorruptRecordError,
    KafkaError,
    KafkaTimeoutError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)
from kafka.structs import OffsetAndMetadata

from dylora_stream.core.errors import (
    BrokerError,
    BrokerUnreachable,
    OffsetsLost,
    TopicMissing,
    TransactionAborted,
)
from dylora_stream.core.messages import Topic
from dylora_stream.core.ports import Batch, Checkpoint, OwnPositions, Partition
from dylora_stream.stream.kafka import KafkaConfig, client_options, connect, consumer_options, kafka_errors
from dylora_stream.stream.pacing import poll
from dylora_stream.stream.raw import in_order, raw_record

__all__ = ["CLOSE_S", "KafkaSource"]

CLOSE_S = 5.0  # for leaving the group
UNSETTLED = -1  # no generation: the client's own mark for "not a member"

log = structlog.get_logger(__name__)


class KafkaSource:
    """One member of a consumer group (core.ports.Source).

    `own` are the reader's own positions, in place of the committed offsets. `witness` is a topic that this group's work
    writes to: records in it prove that the group has worked before, so that missing committed offsets are lost ones
    and not those of a first start.
    """

    def __init__(
        self,
        config: KafkaConfig,
        topics: Sequence[Topic],
        *,
        own: OwnPositions | None = None,
        witness: Topic | None = None,
    ) -> None:
        self._config = config
        self._topics = [config.topic(topic) for topic in topics]
        self._own = own
        self._unproved: dict[TopicPartition, tuple[int, int]] = {}  # position, time of the record before
        self._witness = None if witness is None else config.topic(witness)
        self._is_paced = config.is_embedded
        self._generation = UNSETTLED
        self._last_answer_s = time.monotonic()
        self._timeout_ms = round(config.request_timeout_s * 1000)
        options = consumer_options(config, "source", in_group=True)
        self._consumer = connect(lambda: KafkaConsumer(**options), config)
        self._is_closed = False
        self._may_be_member = False  # polled, and not refused: a join may be under way
        try:
            with kafka_errors(f"looking for {', '.join(self._topics)}"):
                self._check_topics()
                self._consumer.subscribe(topics=self._topics)
        except BaseException:
            self.close()
            raise

    def poll(self, max_records: int, timeout_s: float) -> Batch:
        """See core.ports.Source.poll."""
        self._may_be_member = False
        try:
            batch = self._poll(max_records, timeout_s)
        except TransactionAborted as error:  # the group moved on while it was asked
            log.warning("group_moved_on", cause=str(error))
            self._generation = UNSETTLED
            self._check_alive(has_records=False)
            batch = Batch()
        self._may_be_member = True
        return batch

    def _poll(self, max_records: int, timeout_s: float) -> Batch:
        with kafka_errors(f"reading {', '.join(self._topics)}"):
            group = self._consumer.group_metadata()  # 1
            restarted: dict[Partition, int] = {}
            try:
                polled = poll(  # 2
                    self._consumer, timeout_s, max_records=max_records, is_paced=self._is_paced
                )
            except NoOffsetForPartitionError:
                polled = {}
                self._generation = UNSETTLED
            except OffsetOutOfRangeError as error:
                restarted = self._restart_lost(
                    error.args[0] if error.args and isinstance(error.args[0], dict) else {}
                )
                polled = {}
            except CorruptRecordError as error:
                raise self._unreadable(error) from error
            self._take_up_join()
            now = self._consumer.group_metadata()
            if now.generation_id < 0 or now.generation_id != group.generation_id:
                self._generation = UNSETTLED
            if self._generation == UNSETTLED or self._generation != now.generation_id:
                self._settle()
                return Batch()
            self._check_alive(has_records=bool(polled))
            polled, others = self._proved(polled)
            if others:
                restarted = self._restart_lost(others)
        offsets = {
            (partition.topic, partition.partition): records[-1].offset + 1
            for partition, records in polled.items()
            if records
        }
        checkpoint = Checkpoint(offsets=offsets, group=group)
        return Batch(records=in_order(polled), checkpoint=checkpoint, restarted=restarted)

    def rewind(self) -> None:
        """See core.ports.Source.rewind. The next poll seeks: what a transaction failed for may last a moment longer."""
        self._generation = UNSETTLED

    def lag_records(self) -> float:
        """See core.ports.Source.lag_records."""
        try:
            with kafka_errors("measuring the lag"):
                assigned = self._consumer.assignment()
                if self._generation == UNSETTLED:
                    return math.nan
                ends = self._consumer.end_offsets(assigned, timeout_ms=self._timeout_ms) if assigned else {}
                positions = {
                    partition: self._consumer.position(partition, timeout_ms=self._timeout_ms) or 0
                    for partition in ends
                }
                return float(sum(max(0, end - positions[partition]) for partition, end in ends.items()))
        except BrokerError as error:  # partitions moved between two questions, or the broker is slow
            log.debug("lag_unknown", cause=str(error))
            return math.nan

    def assignment(self) -> frozenset[tuple[str, int]]:
        """The partitions that this member owns now."""
        return frozenset((partition.topic, partition.partition) for partition in self._consumer.assignment())

    def committed_notes(self) -> frozenset[str]:
        """See core.ports.Source.committed_notes. Before the first assignment every partition of the topics counts."""
        with kafka_errors("reading the committed notes"):
            partitions = self._consumer.assignment() or self._all_partitions()
            notes = [found.metadata for found in self._committed(partitions).values()]
        return frozenset(note for note in notes if note)

    def close(self) -> None:
        """See core.ports.Source.close. The static member is taken out, so that others get its partitions at once; so is
        one whose first join is not done, for which a broker may wait as long as it likes."""
        if self._is_closed:
            return
        self._is_closed = True
        is_member = self._may_be_member or self._consumer.group_metadata().generation_id >= 0
        with suppress(KafkaError, OSError):
            self._consumer.close(autocommit=False, timeout_ms=round(CLOSE_S * 1000))
        if is_member:
            self._leave()

    def _take_up_join(self) -> None:
        """A join that takes longer than a poll is finished by a later one, unless its cause is gone by then, as where a
        topic's partitions were not known while a broker restarted. Then the client forgets it: it would never beat its
        heart again, and what its member answers could not be committed once the group has given it up."""
        coordinator = self._consumer._coordinator  # noqa: SLF001 - the client has no other way to ask for it
        if coordinator.rebalance_in_progress() and not coordinator.need_rejoin():
            coordinator.request_rejoin()

    # -- settling a generation --

    def _settle(self) -> None:
        """Seek every assigned partition to where to go on. A broker that is slow leaves it for the next poll."""
        group = self._consumer.group_metadata()
        assigned = sorted(self._consumer.assignment())
        if group.generation_id < 0 or not assigned:
            self._generation = group.generation_id
            self._check_alive(has_records=False)
            return
        try:
            starts = self._own_starts(assigned, self._own) if self._own else self._committed_starts(assigned)
        except KafkaTimeoutError:
            self._check_alive(has_records=False)
            return
        if self._consumer.group_metadata().generation_id != group.generation_id:
            return
        for partition, offset in starts.items():
            if partition in self._consumer.assignment():
                self._consumer.seek(partition, offset)
        self._last_answer_s = time.monotonic()
        self._generation = group.generation_id

    def _own_starts(self, assigned: Sequence[TopicPartition], own: OwnPositions) -> dict[TopicPartition, int]:
        """The own positions, or the record before each where the topic still has it."""
        positions, stamps = own.positions(), own.stamps()
        first = self._edge("earliest", assigned)
        starts = {part: positions.get(tuple(part), first[part]) for part in assigned}
        self._unproved = {
            part: (start, stamps[tuple(part)])
            for part, start in starts.items()
            if tuple(part) in stamps and start > first[part]
        }
        return starts | {part: start - 1 for part, (start, _) in self._unproved.items()}

    def _proved(
        self, polled: Mapping[TopicPartition, Sequence[ConsumerRecord]]
    ) -> tuple[dict[TopicPartition, Sequence[ConsumerRecord]], dict[TopicPartition, int]]:
        """The records behind the own positions, and positions before which another record stands than was taken."""
        proved, others = dict(polled), {}
        for part, records in polled.items():
            position, stamp = self._unproved.pop(part, (0, 0))
            if records[0].offset == position - 1:
                proved[part] = records[1:]
                if raw_record(records[0]).timestamp_ms != stamp:
                    proved[part], others[part] = (), position
        return proved, others

    def _committed_starts(self, assigned: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        starts = {part: found.offset for part, found in self._committed(assigned).items()}
        missing = [part for part in assigned if part not in starts]
        if missing:
            begun = self._committed_edge(self._first_start(missing), missing)
            log.info(
                "partitions_started", offsets={f"{p.topic}:{p.partition}": at for p, at in begun.items()}
            )
            starts |= begun
        return starts

    def _committed_edge(self, edge: str, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """Where to begin, committed at once: a rewind goes back to it, and not past what came since to a later end."""
        begun = self._edge(edge, partitions)
        self._consumer.commit(
            {part: OffsetAndMetadata(offset, "", -1) for part, offset in begun.items()},
            timeout_ms=self._timeout_ms,
        )
        return begun

    def _first_start(self, missing: Sequence[TopicPartition]) -> str:
        """Where partitions without a committed offset start: added ones and those of a first start at the beginning."""
        others = [part for part in self._all_partitions() if part not in missing]
        is_known = {part.topic for part in self._committed(others)}
        lost = [part for part in missing if part.topic not in is_known]
        if not lost:
            return "earliest"
        if self._config.start_from is not None:
            return self._config.start_from
        if self._witness is None or not self._records_in(self._witness):
            return "earliest"
        raise OffsetsLost(
            f"group {self._config.group} has no committed offsets on {lost[0].topic}, but {self._witness} shows "
            "that it has worked before: they expired (after 7 idle days by default) or were deleted. Set "
            "kafka.start_from to `earliest` (answer everything again) or `latest` (skip what is there)"
        )

    def _restart_lost(self, lost: Mapping[TopicPartition, int]) -> dict[Partition, int]:
        """Positions that the topic no longer holds: go on from `start_from`, or stop with an explanation.

        The client tells of one partition at a time; where topics were made anew all are looked at together.
        """
        who = f"group {self._config.group}"
        if self._own is not None:
            who, lost = "this worker's database", {**lost, **self._own_lost(self._own.positions())}
        where = ", ".join(f"{part.topic}:{part.partition}:{offset}" for part, offset in lost.items())
        if self._config.start_from is None or not lost:
            raise OffsetsLost(
                f"{who} stands at {where or 'an offset'}, which its topic does not hold "
                "(deleted by retention, or the topic was made anew). Set kafka.start_from to `earliest` or "
                "`latest` to go on"
            )
        edge = self._edge if self._own is not None else self._committed_edge
        starts = edge(self._config.start_from, list(lost))
        for partition, offset in starts.items():
            self._unproved.pop(partition, None)
            self._consumer.seek(partition, offset)
        log.warning("offsets_lost", positions=where, start_from=self._config.start_from)
        return {(part.topic, part.partition): offset for part, offset in starts.items()}

    def _own_lost(self, own: Mapping[Partition, int]) -> dict[TopicPartition, int]:
        """The reader's own positions that lie outside of their partitions."""
        mine = [part for part in sorted(self._consumer.assignment()) if tuple(part) in own]
        first, last = self._edge("earliest", mine), self._edge("latest", mine)
        return {part: own[tuple(part)] for part in mine if not first[part] <= own[tuple(part)] <= last[part]}

    def _unreadable(self, error: CorruptRecordError) -> BrokerError:
        """The client cannot get past a record that is broken, or whose header names are not UTF-8; nor can we."""
        where = ", ".join(
            f"{part.topic}:{part.partition}:{self._consumer.position(part, timeout_ms=1000)}"
            for part in sorted(self._consumer.assignment())
        )
        way = f"kafka-consumer-groups --group {self._config.group} --reset-offsets --to-offset"
        if self._own is not None:
            way = "kafka-delete-records, and kafka.start_from=earliest, as this reader keeps positions of its own"
        return BrokerError(
            f"a record cannot be decoded ({error}); it stands at or soon after {where}. Go on behind the whole batch "
            f"that it was sent in: {way}"
        )

    # -- the broker's numbers --

    def _committed(
        self, partitions: Sequence[TopicPartition] | set[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        found = {
            part: self._consumer.committed(part, metadata=True, timeout_ms=self._timeout_ms)
            for part in partitions
        }
        return {
            part: committed
            for part, committed in found.items()
            if committed is not None and committed.offset >= 0
        }

    def _edge(self, edge: str, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        if not partitions:
            return {}
        read = self._consumer.beginning_offsets if edge == "earliest" else self._consumer.end_offsets
        return dict(read(partitions, timeout_ms=self._timeout_ms))

    def _all_partitions(self) -> list[TopicPartition]:
        return [
            TopicPartition(topic, number)
            for topic in self._topics
            for number in sorted(self._consumer.partitions_for_topic(topic) or ())
        ]

    def _records_in(self, topic: str) -> bool:
        numbers = self._consumer.partitions_for_topic(topic) or ()
        return any(self._edge("latest", [TopicPartition(topic, number) for number in numbers]).values())

    def _check_topics(self) -> None:
        known = self._consumer.topics()
        missing = [topic for topic in self._topics if topic not in known]
        if missing:
            raise TopicMissing(
                f"there is no topic {', '.join(missing)} at {self._config.bootstrap_servers}; create it with "
                "`dylora-stream topics create`, or correct topics.* and kafka.prefix"
            )

    def _check_alive(self, *, has_records: bool) -> None:
        """The client never says that the broker is gone: ask, when nothing came for as long as one may wait."""
        now = time.monotonic()
        if has_records:
            self._last_answer_s = now
        if now - self._last_answer_s <= max(self._config.connect_timeout_s, 1.0):
            return
        try:
            self._edge("latest", self._all_partitions())
        except KafkaTimeoutError as error:
            raise BrokerUnreachable(
                f"the broker at {self._config.bootstrap_servers} has not answered for {now - self._last_answer_s:.0f} s"
            ) from error
        self._last_answer_s = time.monotonic()

    def _leave(self) -> None:
        options = client_options(self._config, "leave")
        with suppress(KafkaError, OSError):
            admin = KafkaAdminClient(**options)
            try:
                admin.remove_group_members(
                    self._config.group, [MemberToRemove(group_instance_id=self._config.instance)]
                )
            finally:
                admin.close()
