"""When a buffer is trained, when an expert is trained again, when it is mature. Pure rules and their numbers."""

from collections.abc import Iterable
from dataclasses import dataclass

from dylora_stream.core.ledger import LedgerRow
from dylora_stream.core.messages import SampleReason
from dylora_stream.learn.rows import by_age

__all__ = ["BackOff", "LifecycleConfig", "TrackRecord", "TrackRecords", "newest_distinct"]

FIRST_WAIT_S = 4.0  # of a back-off
MOST_DOUBLINGS = 8  # of it: to 17 minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleConfig:
    """The numbers of an expert's life. Rows are distinct and labelled wherever they are counted."""

    rows_to_seed: int = 48  # a cluster's buffer is ready; a fifth of them is held out for the check
    max_seed_rows: int = 80  # newest ones, when more have gathered
    sketch_rows: int = 16  # novel rows that make a sketch job worth its child
    sketch_after_s: float = 4.0  # ... or the oldest has waited this long
    filling_s: float = 60.0  # a buffer with a quarter of its rows that got one this recently comes first
    expire_after_days: float = 30.0  # a cluster without a new row for so long is given up
    rows_to_consolidate: int = 96  # new rows of an expert since it was last trained
    max_consolidate_rows: int = 192  # its old rows among them
    rows_to_mature: int = 40  # answered since the expert went live, with a right answer to compare
    mature_accuracy: float = 0.5  # share of those answered exactly right
    max_rejections: int = 3  # then the cluster is unlearnable
    rejection_backoff: float = 1.5  # a rejected cluster's buffer grows by this factor

    def __post_init__(self) -> None:
        for name in (
            "rows_to_seed",
            "sketch_rows",
            "rows_to_consolidate",
            "rows_to_mature",
            "max_rejections",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_seed_rows < self.rows_to_seed:
            raise ValueError(f"max_seed_rows must be at least rows_to_seed ({self.rows_to_seed})")
        if self.max_consolidate_rows < self.rows_to_consolidate:
            raise ValueError(
                f"max_consolidate_rows must be at least rows_to_consolidate ({self.rows_to_consolidate})"
            )
        if not 0 <= self.mature_accuracy <= 1:
            raise ValueError(f"mature_accuracy must lie between 0 and 1, not {self.mature_accuracy}")
        if self.expire_after_days <= 0:
            raise ValueError(f"expire_after_days must be above 0, not {self.expire_after_days}")
        if self.rejection_backoff <= 1:
            raise ValueError(f"rejection_backoff must be above 1, not {self.rejection_backoff}")

    @property
    def expire_after_ms(self) -> int:
        """The same in milliseconds."""
        return round(self.expire_after_days * 24 * 3600 * 1000)

    @property
    def expert_texts(self) -> int:
        """Newest texts of an expert whose rows are held in memory: twice as many as a consolidation takes."""
        return 2 * self.max_consolidate_rows

    def rows_wanted(self, rejections: int) -> int:
        """How many rows a cluster must have before its next attempt."""
        wanted = self.rows_to_seed
        for _ in range(rejections):
            wanted = int(wanted * self.rejection_backoff) + 1
        return wanted


@dataclass(slots=True)
class TrackRecord:
    """Prequential record of one expert: rows it answered before anyone told it the right answer."""

    rows: int = 0
    correct: int = 0

    def add(self, *, is_correct: bool) -> None:
        """One more row with a right answer to compare."""
        self.rows += 1
        self.correct += is_correct

    @property
    def accuracy(self) -> float:
        """Share answered exactly right; 0 before the first row."""
        return self.correct / self.rows if self.rows else 0.0

    def is_mature(self, config: LifecycleConfig) -> bool:
        """Enough rows, enough of them right. Age plays no part."""
        return self.rows >= config.rows_to_mature and self.accuracy >= config.mature_accuracy


class TrackRecords:
    """The track records of all experts."""

    def __init__(self, rows: Iterable[LedgerRow]) -> None:
        self._tracks: dict[str, TrackRecord] = {}
        for row in rows:
            self.add(row)

    def add(self, row: LedgerRow) -> None:
        """What a row says of the expert that answered it; one of a new kind, that somebody had to answer, nothing."""
        if row.reason != SampleReason.NOVEL and row.is_correct is not None and row.served_by is not None:
            self._tracks.setdefault(row.served_by, TrackRecord()).add(is_correct=row.is_correct)

    def of(self, expert_id: str) -> TrackRecord:
        """An expert's."""
        return self._tracks.get(expert_id, TrackRecord())


@dataclass(slots=True)
class BackOff:
    """How long to leave alone what failed: twice as long after each failure in a row."""

    first_s: float = FIRST_WAIT_S
    failures: int = 0
    until_ms: int = 0

    def pause(self, now_ms: int) -> None:
        """It failed, and what is tried next is something else: the first, short while, not doubled."""
        self.until_ms = now_ms + round(1000 * self.first_s)

    def end(self) -> None:
        """It did not fail."""
        self.failures = self.until_ms = 0

    def failed(self, now_ms: int) -> None:
        """It failed once more."""
        doublings = min(self.failures, MOST_DOUBLINGS)
        self.until_ms = now_ms + round(1000 * self.first_s * 2**doublings)
        self.failures += 1


def newest_distinct(rows: Iterable[LedgerRow], limit: int) -> list[LedgerRow]:
    """The newest labelled rows with distinct inputs, at most `limit`, oldest first."""
    newest = {row.input: row for row in sorted(rows, key=by_age) if row.output is not None}
    return sorted(newest.values(), key=by_age)[-limit:]
