"""What was in hand when a process ended is found out by the next ones, and nothing else is suspected."""

import json
from pathlib import Path

import pytest

from dylora_stream.core.messages import Position, RawRecord
from dylora_stream.serve.poison import MOST_ENDS, PoisonGuard
from dylora_stream.store.journal import FileJournal
from dylora_stream.testing import MemoryJournal


def records(*offsets: int) -> list[RawRecord]:
    """Records of one partition."""
    return [
        RawRecord(
            position=Position("requests", 0, offset), key=None, value=b"text", headers=(), timestamp_ms=0
        )
        for offset in offsets
    ]


def end_with(journal: MemoryJournal, *offsets: int) -> None:
    """A process that ends while it answers these."""
    with PoisonGuard(journal).holding(records(*offsets)):
        left_behind = journal.text
    journal.text = left_behind


def offsets_of(parts: list[list[RawRecord]]) -> list[list[int]]:
    """The same by offset."""
    return [[record.position.offset for record in part] for part in parts]


def test_after_an_end_its_records_are_taken_one_by_one() -> None:
    """The others stay together, and the order is kept."""
    journal = MemoryJournal()
    end_with(journal, 3, 4)
    guard = PoisonGuard(journal)
    assert offsets_of(guard.parts(records(1, 2, 3, 4, 5, 6))) == [[1, 2], [3], [4], [5, 6]]
    assert [guard.ends(record) for record in records(3, 4)] == [0, 0]


def test_ends_with_one_record_in_hand_are_counted_across_processes() -> None:
    """They need not follow upon one another: a neighbour may be taken down in between."""
    journal = MemoryJournal()
    for offsets in [(3, 4), (4,), (5, 6), (4,), (4,)]:
        end_with(journal, *offsets)
    guard = PoisonGuard(journal)
    assert guard.ends(records(4)[0]) == MOST_ENDS
    assert guard.ends(records(5)[0]) == 0


def test_what_raises_is_no_end() -> None:
    """A device that fails stops the process with an error, again and again; no record is blamed for it."""
    journal = MemoryJournal()
    guard = PoisonGuard(journal)
    with pytest.raises(MemoryError), guard.holding(records(4)):
        raise MemoryError
    assert offsets_of(PoisonGuard(journal).parts(records(3, 4))) == [[3, 4]]


def test_what_is_settled_is_forgotten() -> None:
    """A record that comes to the same place later, the topic made anew, is another one."""
    journal = MemoryJournal()
    end_with(journal, 3, 4)
    end_with(journal, 4)
    guard = PoisonGuard(journal)
    guard.settled(records(3, 4))
    assert offsets_of(guard.parts(records(3, 4))) == [[3, 4]]
    assert json.loads(journal.text) == {"in_hand": [], "ends": {}}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"in_hand": 1}', '{"ends": {"a": "b"}}', '{"ends": []}'])
def test_a_journal_that_cannot_be_read_says_nothing(text: str) -> None:
    """The process was ended while it wrote, or somebody else wrote there."""
    assert offsets_of(PoisonGuard(MemoryJournal(text)).parts(records(3, 4))) == [[3, 4]]


def test_the_journal_of_a_folder_outlives_its_process_and_survives_what_it_cannot_write(
    tmp_path: Path,
) -> None:
    """Answering goes on where the disk is full or gone."""
    path = tmp_path / "w-serve-0.in-hand"
    FileJournal(path).write("here")
    assert FileJournal(path).read() == "here"
    assert FileJournal(tmp_path / "nowhere").read() == ""
    lost = FileJournal(tmp_path / "gone" / "in-hand")
    lost.write("here")
    assert lost.read() == ""
