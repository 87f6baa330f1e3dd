"""Records that end the process: one that does so each time it is answered alone becomes a dead letter.

What raises is the pipeline's to blame. This is for what kills: memory that the system takes back, a crash in native
code. Without it the process is started again, takes the same record, and falls, for ever.

    1  a batch's positions are written down before it is answered, and crossed out after
    2  what a process finds written down when it starts ended the one before: these records are answered one by one
    3  a record that was alone in hand at `MOST_ENDS` ends is buried, unanswered

Somebody else may have ended the process, an operator or the power: all that comes of it is a batch answered one by one.
Whatever raises ends nothing and counts for nothing. Each worker keeps its own account, so that of n workers which take
a partition over from one another each may fall that often.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import structlog

from dylora_stream.core.messages import RawRecord
from dylora_stream.core.ports import CrashJournal

__all__ = ["MOST_ENDS", "PoisonGuard"]

MOST_ENDS = 3

log = structlog.get_logger(__name__)


class PoisonGuard:
    """What was in hand when earlier processes ended, and what is in hand now."""

    def __init__(self, journal: CrashJournal) -> None:
        self._journal = journal
        in_hand, self._ends = _read(journal.read())
        if len(in_hand) == 1:
            self._ends[in_hand[0]] = self._ends.get(in_hand[0], 0) + 1
        self._suspects = {*in_hand, *self._ends}
        if in_hand:
            log.warning("poison_suspected", records=len(in_hand), position=in_hand[0])
        self._note([])

    def parts(self, records: Sequence[RawRecord]) -> list[list[RawRecord]]:
        """The records in order: those under suspicion each alone, the others together."""
        marked = ((str(record.position), record) for record in records)
        runs = groupby(marked, key=lambda each: each[0] if each[0] in self._suspects else "")
        return [[record for _, record in run] for _, run in runs]

    @contextmanager
    def holding(self, part: Sequence[RawRecord]) -> Iterator[None]:
        """These are being answered: should the process end meanwhile, the next one knows."""
        self._note([str(record.position) for record in part])
        try:
            yield
        finally:
            self._note([])

    def ends(self, record: RawRecord) -> int:
        """How many processes ended while they answered this record alone."""
        return self._ends.get(str(record.position), 0)

    def settled(self, records: Sequence[RawRecord]) -> None:
        """What came of these is on the broker: they do not come again."""
        if not self._suspects:
            return
        for record in records:
            self._suspects.discard(str(record.position))
            self._ends.pop(str(record.position), None)
        self._note([])

    def _note(self, in_hand: list[str]) -> None:
        self._journal.write(json.dumps({"in_hand": in_hand, "ends": self._ends}))


def _read(text: str) -> tuple[list[str], dict[str, int]]:
    """What a process left behind; nothing where it is unreadable: it was ended while it wrote."""
    try:
        note = json.loads(text or "{}")
        return [str(each) for each in note.get("in_hand", [])], {
            str(position): int(ends) for position, ends in note.get("ends", {}).items()
        }
    except (ValueError, TypeError, AttributeError):
        return [], {}
