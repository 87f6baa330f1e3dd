"""What the demo sent and what came back: the only truth its table is computed from.

Everything is keyed by position. Results are counted, not collected, so a record answered twice shows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Journal", "Reply", "Sent", "Task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kind of record: its name (never sent) and its rows, (input, output), in the order they are sent."""

    name: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One record on the requests topic; `order` counts from 0 over the whole run."""

    task: str
    input: str
    output: str
    position: str
    order: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The first result of a record."""

    output: str
    expert: str | None
    policy: str
    is_novel: bool


@dataclass(slots=True)
class Journal:
    """Grows while the stream plays; `live_at` is how many records had been sent when an expert first served."""

    sent: dict[str, Sent] = field(default_factory=dict)
    replies: dict[str, Reply] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # results a position
    dead: Counter[str] = field(default_factory=Counter)  # dead letters a position
    events: Counter[str] = field(default_factory=Counter)  # lifecycle events a type
    live_at: dict[str, int] = field(default_factory=dict)
    is_training: bool = False

    @property
    def outstanding(self) -> int:
        """Records sent and neither answered nor dead-lettered so far."""
        return len(self.sent) - len(self.counts) - len(self.dead)

    def of(self, task: str) -> list[Sent]:
        """A task's records in the order they were sent."""
        return [record for record in self.sent.values() if record.task == task]

    def is_right(self, record: Sent) -> bool:
        """Whether the record's answer equals the right one, blanks at the ends aside."""
        reply = self.replies.get(record.position)
        return reply is not None and reply.output.strip() == record.output.strip()

    def heard_event(self, kind: str) -> None:
        """A lifecycle event."""
        self.events[kind] += 1
        if kind == "training.started":
            self.is_training = True
        elif kind in ("training.completed", "training.failed"):
            self.is_training = False

    def heard_registry(self, experts: Sequence[str]) -> None:
        """A result was answered under a registry with these experts."""
        for expert in experts:
            self.live_at.setdefault(expert, len(self.sent))

    def totals(self) -> dict[str, int]:
        """Records sent, answered, lost, repeated, dead-lettered, by position."""
        settled = (self.counts.keys() | self.dead.keys()) & self.sent.keys()
        repeated = (
            sum(self.counts.values()) + sum(self.dead.values()) - len(self.counts.keys() | self.dead.keys())
        )
        return {
            "sent": len(self.sent),
            "answered": len(self.counts.keys() & self.sent.keys()),
            "lost": len(self.sent) - len(settled),
            "repeated": repeated,
            "dead_lettered": len(self.dead.keys() & self.sent.keys()),
        }
