"""What a person sees of a long run: how far it is, what is being done, and how long it may still take."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Silence", "Watch", "watching"]

REMEMBERED_S = 3600.0  # of progress that the estimate looks at: stages are slow and uneven


class Silence:
    """Shows nothing."""

    def begin(self, stages: int) -> None:
        """So many stages lie ahead."""

    def stage(self, what: str) -> None:
        """A stage begins."""

    def tell(self, what: str, step: int, steps: int) -> None:
        """What is being done within the stage; steps 0: nobody knows how many."""

    def finish(self) -> None:
        """The stage is over."""


class Watch(Silence):
    """Two bars: stages, and the steps of what is being done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._whole = progress.add_task("stages", total=None)
        self._part = progress.add_task("", total=None)

    def begin(self, stages: int) -> None:
        """See `Silence`."""
        self._progress.update(self._whole, total=stages)

    def stage(self, what: str) -> None:
        """See `Silence`."""
        self._progress.update(self._whole, description=what)

    def tell(self, what: str, step: int, steps: int) -> None:
        """See `Silence`."""
        self._progress.update(self._part, description=what, completed=step, total=steps or None)

    def finish(self) -> None:
        """See `Silence`."""
        self._progress.advance(self._whole)


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Within: the bars are shown, and go away at the end."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, speed_estimate_period=REMEMBERED_S) as progress:
        yield Watch(progress)
