"""Steps 1 and 2 of learn's round: what was polled becomes samples and late answers that are new to the database.

The database's positions say what is new, whatever the source hands out. They are the reader's own: Kafka's committed
offsets are for display. Rows and answers carry the era of the requests topic, see `learn.eras`; one ends where samples
go on at a lower offset than was reached, and where a sample stands at the position of a row that it is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from dylora_stream.core.errors import BadRecord
from dylora_stream.core.ledger import Changes, Ledger
from dylora_stream.core.messages import Feedback, RawRecord, Sample
from dylora_stream.core.ports import Checkpoint, Codec, Partition
from dylora_stream.learn.curator import Curator
from dylora_stream.learn.eras import in_era

__all__ = ["Intake", "Taken"]

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Taken:
    """What is new of a batch; samples, answers, positions and era are to be committed together."""

    samples: list[Sample] = field(default_factory=list)
    feedback: list[Feedback] = field(default_factory=list)
    positions: dict[Partition, int]
    stamps: dict[Partition, int]
    era: int | None = None  # a new one


class Intake:
    """Decodes for a curator. Its positions are the database's, once what it handed out is committed."""

    def __init__(
        self, ledger: Ledger, codec: Codec, curator: Curator, *, feature_space: str, feedback_topic: str
    ) -> None:
        self._ledger, self._codec, self._curator = ledger, codec, curator
        self._feature_space, self._feedback_topic = feature_space, feedback_topic
        self._era = 0
        self.positions: dict[Partition, int] = {}

    def resume(self, era: int) -> None:
        """Go on where the database stands."""
        self.positions, self._era = self._ledger.positions(), era

    def restart(self, restarted: Mapping[Partition, int]) -> Changes:
        """The topics do not hold the database's positions any more, and go on at these."""
        falls = [part for part, offset in restarted.items() if offset < self.positions.get(part, 0)]
        if any(topic != self._feedback_topic for topic, _ in falls):
            self._end_era()
        self.positions |= restarted
        return Changes(positions=dict(restarted), era=self._era)

    def take(self, records: Sequence[RawRecord], checkpoint: Checkpoint) -> Taken | None:
        """What is new in a batch, None where nothing moves. Rows that answers are for are brought to hand."""
        fresh = [record for record in records if record.position.offset >= self._next_offset(record)]
        ahead = {
            part: offset
            for part, offset in checkpoint.offsets.items()
            if offset > self.positions.get(part, 0)
        }
        if not fresh and not ahead:
            return None
        stamps = {(record.position.topic, record.position.partition): record.timestamp_ms for record in fresh}
        taken, era = Taken(positions=ahead, stamps=stamps), self._era
        for record in fresh:
            try:
                self._decode(record, taken)
            except BadRecord as error:
                log.warning("sample_unreadable", position=str(record.position), reason=error.reason)
        self._bring_back([str(in_era(sample.position, self._era)) for sample in taken.samples])
        taken.samples = [self._dated(sample) for sample in taken.samples]
        taken.feedback = [
            late if late.position is None else replace(late, position=in_era(late.position, self._era))
            for late in taken.feedback
        ]
        self._recall([late for late in taken.feedback if not self._curator.late.remembers(late)])
        taken.era = None if era == self._era else self._era
        self.positions |= ahead
        return taken

    def _decode(self, record: RawRecord, taken: Taken) -> None:
        """Features of another backbone or stem say nothing here; such a sample is left out, and said to be."""
        if record.position.topic == self._feedback_topic:
            taken.feedback.append(self._codec.decode_feedback(record))
            return
        sample = self._codec.decode_sample(record)
        if sample.feature_space != self._feature_space:
            raise BadRecord(
                "other_feature_space", f"{sample.position} has features of {sample.feature_space}"
            )
        taken.samples.append(sample)

    def _dated(self, sample: Sample) -> Sample:
        dated = replace(sample, position=in_era(sample.position, self._era))
        if not self._curator.knows_another(dated):
            return dated
        self._end_era()
        return replace(sample, position=in_era(sample.position, self._era))

    def _end_era(self) -> None:
        self._era += 1
        log.warning("requests_made_anew", era=self._era)

    def _bring_back(self, positions: Sequence[str]) -> None:
        """What was trained on is never replaced, though it lies in the ledger alone."""
        for row in self._ledger.at([each for each in positions if each not in self._curator.rows]):
            self._curator.rows.put(row)

    def _recall(self, answers: Sequence[Feedback]) -> None:
        """Rows of answers that come very late lie in the ledger alone."""
        for row in self._ledger.find(answers) if answers else ():
            self._curator.late.recall(row)

    def _next_offset(self, record: RawRecord) -> int:
        return self.positions.get((record.position.topic, record.position.partition), 0)
