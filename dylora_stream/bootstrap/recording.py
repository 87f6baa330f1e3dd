"""Topics read out for people: recorded to files, dead letters shown and sent again."""

from collections.abc import Iterator
from contextlib import closing

from dylora_stream.bootstrap.parts import kafka_of
from dylora_stream.core.errors import BadRecord
from dylora_stream.core.messages import DeadLetter, RawRecord, Topic
from dylora_stream.settings import Settings
from dylora_stream.stream import codec
from dylora_stream.stream.changelog import KafkaChangelog

__all__ = ["dead_letters", "is_whole", "recorded"]

READ_S = 30.0  # without a record, before the broker is given up
FOLLOW_S = 0.5


def recorded(settings: Settings, topic: Topic, *, follow: bool = False) -> Iterator[RawRecord]:
    """A topic's records from the beginning to where it ends now, or for ever; in order within a partition."""
    with closing(KafkaChangelog(kafka_of(settings, "record"), topic)) as log:
        for records in log.to_end(READ_S):
            yield from records
        while follow:
            yield from log.poll(FOLLOW_S)


def dead_letters(settings: Settings) -> Iterator[DeadLetter]:
    """All dead letters so far; what others wrote into the topic is passed over."""
    for record in recorded(settings, Topic.DEAD_LETTERS):
        try:
            yield codec.decode_dead_letter(record)
        except BadRecord:
            continue


def is_whole(letter: DeadLetter, settings: Settings) -> bool:
    """Whether it is a request that was kept as it was sent; of one over the topic's limit only its head was."""
    is_request = letter.record.position.topic == kafka_of(settings, "record").topic(Topic.REQUESTS)
    return is_request and not letter.is_cut
