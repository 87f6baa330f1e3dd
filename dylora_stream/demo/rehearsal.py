"""A file of requests through the daemon without a broker: which experts come of it, when, and how well each answers.

Prequential: every record is answered before anything is learned of it, and counts for whoever answered it.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dylora_stream.bootstrap import Heard
from dylora_stream.bootstrap.driver import StreamDriver
from dylora_stream.core.errors import BadRecord
from dylora_stream.core.messages import Position, RawRecord
from dylora_stream.demo.report import totals_table
from dylora_stream.demo.view import event_line
from dylora_stream.ops.files import FileRecord, ReadOptions, count_rows, read_records
from dylora_stream.settings import Settings
from dylora_stream.stream.incoming import decode_request

__all__ = ["Answered", "Rehearsal", "RehearsalConfig", "rehearse"]

BACKBONE = "backbone"


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalConfig:
    """What the command line says."""

    file: Path
    options: ReadOptions = field(default_factory=ReadOptions)
    batch: int = 16
    """Records that are answered before learn has its turn."""
    keep: Path | None = None
    """A new folder for database, jobs and experts; None: they go with the run."""
    report: Path | None = None


@dataclass(slots=True, kw_only=True)
class Answered:
    """What an expert, or the backbone, answered."""

    name: str
    since: int
    """The number of the first record that it answered, from 1."""
    records: int = 0
    labelled: int = 0
    right: int = 0

    @property
    def accuracy(self) -> float | None:
        """Exact match where the right answer is known."""
        return self.right / self.labelled if self.labelled else None


@dataclass(slots=True)
class Rehearsal:
    """What was played and what came of it."""

    answers: list[str | None] = field(default_factory=list)  # the right one of each record, where it says it
    answerers: dict[str, Answered] = field(default_factory=dict)
    answered: int = 0
    novel: int = 0
    dead_letters: int = 0
    events: Counter[str] = field(default_factory=Counter)

    def send(self, records: Sequence[FileRecord]) -> None:
        """What comes next."""
        for record in records:
            self.answers.append(_right_answer(record, len(self.answers)))

    def hear(self, heard: Heard) -> None:
        """What came of them."""
        self.dead_letters += len(heard.dead_letters)
        self.events.update(event.type for event in heard.events)
        for result in heard.results:
            number = Position.parse(result.position).offset
            name = result.expert or BACKBONE
            by = self.answerers.setdefault(name, Answered(name=name, since=number + 1))
            self.answered += 1
            self.novel += result.novel
            by.records += 1
            right = self.answers[number]
            if right is not None:
                by.labelled += 1
                by.right += result.output.strip() == right.strip()

    def totals(self) -> dict[str, int]:
        """Records, by what became of them."""
        return {
            "sent": len(self.answers),
            "answered": self.answered,
            "dead-lettered": self.dead_letters,
            "called novel": self.novel,
        }

    def experts(self) -> dict[str, int]:
        """What learn did."""
        return {
            "clusters": self.events["cluster.created"],
            "spawned": self.events["expert.spawned"],
            "rejected": self.events["expert.rejected"],
            "matured": self.events["expert.matured"],
            "new versions": self.events["expert.promoted"],
        }


def rehearse(config: RehearsalConfig, settings: Settings, console: Console) -> None:
    """Play the file and tell what came of it; after Ctrl-C, of what was played until then. Raises DyloraError."""
    rehearsal = Rehearsal()
    try:
        with _folder(config.keep) as folder, _progress(console) as progress:
            task = progress.add_task("answering", total=count_rows(config.file, config.options))
            with StreamDriver(settings, folder) as driver:
                rows = read_records(config.file, config.options)
                while records := list(islice(rows, config.batch)):
                    rehearsal.send(records)
                    heard = driver.play(records)
                    rehearsal.hear(heard)
                    _tell(heard, len(rehearsal.answers), progress.console)
                    progress.advance(task, len(records))
    finally:
        _conclude(config, rehearsal, console)


def _tell(heard: Heard, played: int, console: Console) -> None:
    for event in heard.events:
        if (line := event_line(event.type, event.entity, dict(event.data))) is not None:
            console.print(f"[{played:>6} played] {line}", highlight=False, markup=False)


def _conclude(config: RehearsalConfig, rehearsal: Rehearsal, console: Console) -> None:
    if not rehearsal.answers:
        return
    console.print(
        _answerers_table(list(rehearsal.answerers.values())),
        totals_table("Records", rehearsal.totals()),
        totals_table("Experts", rehearsal.experts()),
    )
    if config.keep is not None:
        console.print(f"Database, jobs and experts of this run: {config.keep}")
    if config.report is not None:
        answerers = [asdict(each) | {"accuracy": each.accuracy} for each in rehearsal.answerers.values()]
        document = {
            "answerers": answerers, "records": rehearsal.totals(), "experts": rehearsal.experts()
        }  # fmt: skip
        config.report.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"Report: {config.report}")


def _answerers_table(answerers: Sequence[Answered]) -> Table:
    """For people, within 80 columns."""
    table = Table(
        title="Who answered, and how well",
        caption="since: the first record; labelled: records that name their right answer; right: exactly that answer",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("answered by", no_wrap=True)
    for name in ("since", "records", "labelled", "right"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in answerers:
        right = "-" if each.accuracy is None else f"{each.accuracy:.2f}"
        table.add_row(each.name, str(each.since), str(each.records), str(each.labelled), right)
    return table


def _right_answer(record: FileRecord, number: int) -> str | None:
    """What the request says; None where it says nothing, or is no request and becomes a dead letter."""
    raw = RawRecord(
        position=Position("file", 0, number),
        key=record.key,
        value=record.value,
        headers=record.headers,
        timestamp_ms=record.timestamp_ms or 0,
    )
    try:
        return decode_request(raw).output
    except BadRecord:
        return None


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="dylora-rehearsal-") as folder:
        yield Path(folder)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
