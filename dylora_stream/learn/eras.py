"""Which making of the requests topic a position is of.

A row is keyed by the position of its request. Where topics were made anew offsets begin again, and a new record would
pass for an old row: it would be left out as taken already, or take the place of a row that an expert was trained on,
and a late answer would join the wrong one. So the old rows stay as they are, and from then on the topic's name carries
the number of its making in rows and late answers, `dylora.requests~1:0:42`: no topic can be called so.
"""

from dataclasses import replace

from dylora_stream.core.messages import Position

__all__ = ["in_era", "without_era"]

MARK = "~"  # in no topic's name: Kafka allows letters, digits, dot, underscore and hyphen


def in_era(position: Position, era: int) -> Position:
    """A position of the requests topic as rows of this era have it; 0 is the first."""
    return replace(position, topic=f"{position.topic}{MARK}{era}") if era else position


def without_era(position: Position) -> Position:
    """The position as the broker and the user know it."""
    return replace(position, topic=position.topic.partition(MARK)[0])
