"""The demo's live view: a table while the stream plays, plain lines where there is no terminal."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dylora_stream.demo.journal import Journal, Task

__all__ = ["View", "event_line"]

RECENT = 8  # lines of what happened
LAST = 20  # records of the rolling accuracy
SHOWN = {
    "buffer.ready": "a buffer is full",
    "training.started": "training starts",
    "training.failed": "training failed",
    "expert.spawned": "a new expert",
    "expert.promoted": "a new version",
    "expert.rejected": "a version was rejected",
    "expert.matured": "an expert is mature",
    "routing.changed": "its rows move from dense to sparse",
    "cluster.merged": "a cluster joined",
    "worker.started": "a worker started",
}


class View:
    """Shows the journal as it grows."""

    def __init__(self, console: Console, tasks: Sequence[Task], journal: Journal) -> None:
        self._console = console
        self._tasks = tasks
        self._journal = journal
        self._lines: list[str] = []
        self._live: Live | None = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Redraw while inside, on a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, get_renderable=self._picture, refresh_per_second=4) as self._live:
            yield
        self._live = None

    def tell(self, line: str) -> None:
        """One line of what happened."""
        self._lines.append(line)
        if self._live is None:
            self._console.print(
                f"[{len(self._journal.counts):>5} answered] {line}", highlight=False, markup=False
            )

    def tell_event(self, kind: str, entity: str, data: dict[str, object]) -> None:
        """A lifecycle event, where it means something to a stranger."""
        if (line := event_line(kind, entity, data)) is not None:
            self.tell(line)

    def _picture(self) -> Group:
        table = Table(title="DyLoRA Stream demo")
        for name in ("kind of record", "sent", "answered", "answered by", f"right, last {LAST}"):
            table.add_column(name, justify="left" if name in ("kind of record", "answered by") else "right")
        for task in self._tasks:
            records = self._journal.of(task.name)
            answered = [record for record in records if record.position in self._journal.replies]
            last = answered[-LAST:]
            right = f"{sum(map(self._journal.is_right, last)) / len(last):.0%}" if last else "-"
            by = self._journal.replies[last[-1].position].expert or "backbone" if last else "-"
            table.add_row(task.name, str(len(records)), str(len(answered)), by, right)
        training = (
            "an expert is in training; the stream trickles" if self._journal.is_training else "streaming"
        )
        return Group(table, Text(training, style="bold"), *(Text(line) for line in self._lines[-RECENT:]))


def event_line(kind: str, entity: str, data: Mapping[str, object]) -> str | None:
    """A lifecycle event in words; None where it means nothing to a stranger."""
    if kind not in SHOWN:
        return None
    details = ", ".join(
        f"{key} {data[key]}"
        for key in ("kind", "version", "rows", "decision", "into", "accuracy", "error")
        if key in data
    )
    return f"{SHOWN[kind]}: {entity}" + (f" ({details})" if details else "")
