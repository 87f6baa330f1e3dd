"""Which waiting rows are sketched next, and what becomes of rows that the child cannot sketch.

A job that failed is not asked for again as it was: the next one takes half as many rows, down to one. A row that fails
alone is put behind the others, for it may not be the row (a full disk fails every one of them). Tried alone again right
after a job of others was done, it is given up if it fails, and if it does not, no row is suspected any more. So one
row never keeps the others from being learned.
"""

from collections.abc import Sequence

from dylora_stream.core.ledger import JobRecord, LedgerRow
from dylora_stream.core.ports import Clock
from dylora_stream.learn.lifecycle import BackOff, LifecycleConfig

__all__ = ["Sketching"]

SKETCHED_AT_ONCE = 256  # rows of one sketch job


class Sketching:
    """The queue of rows that wait for their sketches; what failed is remembered by this process alone."""

    def __init__(self, rules: LifecycleConfig, clock: Clock) -> None:
        self._rules = rules
        self._clock = clock
        self._back_off = BackOff()
        self._at_once = SKETCHED_AT_ONCE
        self._suspects: set[str] = set()  # positions of rows that failed alone
        self._is_well = False  # whether the last job was done

    def next(self, waiting: Sequence[LedgerRow]) -> tuple[LedgerRow, ...]:
        """The rows of a job worth doing now, or none; waiting: oldest first."""
        now_ms, rows = self._clock.now_ms(), self._first(waiting)
        if not rows or now_ms < self._back_off.until_ms:
            return ()
        is_old = now_ms - rows[0].time_ms >= 1000 * self._rules.sketch_after_s
        return rows if is_old or len(waiting) >= self._rules.sketch_rows else ()

    def done(self, job: JobRecord) -> None:
        """Its rows have their sketches."""
        self._is_well = True
        self._back_off.end()
        self._at_once = min(2 * self._at_once, SKETCHED_AT_ONCE)
        if self._suspects & set(job.positions):
            self._suspects.clear()

    def failed(self, job: JobRecord) -> str | None:
        """It gave no sketches. The position of the row that is to be given up, if it is one."""
        was_well, self._is_well = self._is_well, False
        if len(job.positions) > 1:
            self._at_once = len(job.positions) // 2
            self._back_off.pause(self._clock.now_ms())
            return None
        (position,) = job.positions
        if was_well and position in self._suspects:
            self._suspects.remove(position)
            return position
        self._suspects.add(position)
        self._back_off.failed(self._clock.now_ms())
        return None

    def _first(self, waiting: Sequence[LedgerRow]) -> tuple[LedgerRow, ...]:
        suspects = [row for row in waiting if row.position in self._suspects]
        others = [row for row in waiting if row.position not in self._suspects]
        if suspects and (self._is_well or not others):
            return (suspects[0],)
        return tuple(others[: self._at_once])
