"""Plays a stream: tasks arrive one after another, and old ones come back.

A phase introduces one task, with a share of returning ones mixed in, and ends when a new expert is live; the last phase
mixes all of them. While an expert is in training the stream goes on at a trickle, as traffic does, so that on two
cores the child gets its turn and the table counts records rather than this machine's speed. Nothing that is sent names
its task.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dylora_stream.core.ports import Clock
from dylora_stream.demo.journal import Journal, Task

__all__ = ["Pace", "Player", "Traffic"]

SERVED = 3  # records of a task that a new expert has answered: it is the task's


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast and how much."""

    window: int = 24  # most records on their way at once
    burst: int = 8  # records of one send; decoding eight takes hardly longer than decoding one
    trickle_per_s: float = 0.8  # records while an expert is in training, still in bursts
    return_share: float = 0.25  # of a phase's records that belong to tasks seen before
    phase_records: int = 320  # of the new task; then the next one comes, expert or not
    kept_share: float = (
        0.3  # of a task's rows, for its return: what an expert learned shows on rows behind it
    )
    after_records: int = 60  # a task, after its expert was live, before the stream may end
    deadline_s: float = 900.0  # the stream ends, whatever is still missing
    kill_serve_at: int | None = None  # records sent
    kill_learn_at: int | None = None


class Traffic(Protocol):
    """The demo's hands: sending, hearing, killing."""

    def send(self, records: Sequence[tuple[str, str, str]]) -> None:
        """(task, input, output) to the requests topic; returns when the broker has them."""

    def hear(self, timeout_s: float) -> None:
        """Read what came back into the journal."""

    def kill(self, role: str) -> None:
        """SIGKILL to a role's process."""


class Player:
    """Sends until every task has had its turn."""

    def __init__(
        self, tasks: Sequence[Task], journal: Journal, traffic: Traffic, clock: Clock, pace: Pace
    ) -> None:
        self._tasks = tasks
        self._journal = journal
        self._traffic = traffic
        self._clock = clock
        self._pace = pace
        self._rng = random.Random(0)
        self._next = {task.name: 0 for task in tasks}
        self._last_trickle_s = clock.monotonic_s()
        self._killed: set[str] = set()
        self._is_last = False
        self._started_s = clock.monotonic_s()

    def play(self, tell: Callable[[str], None]) -> None:
        """All phases; `tell` hears what begins."""
        for number, task in enumerate(self._tasks):
            tell(f"phase {number + 1}: a new kind of record arrives ({task.name})")
            self._phase(task, self._tasks[:number])
        tell("last phase: all kinds, mixed")
        self._is_last = True
        while not self._is_enough() and (left := [task for task in self._tasks if self._left(task)]):
            self._send_when_room(lambda left=left: self._rng.choice(left))  # type: ignore[misc]
        tell("the stream has ended; waiting for the last answers")
        self._settle()

    def _phase(self, task: Task, earlier: Sequence[Task]) -> None:
        known = set(self._journal.live_at)
        first_time = round(len(task.rows) * (1 - self._pace.kept_share))
        limit = min(self._next[task.name] + self._pace.phase_records, first_time)
        while self._next[task.name] < limit and not self._is_late():
            self._send_when_room(lambda: self._pick(task, earlier))
            if self._is_served(task, known):
                return

    def _is_served(self, task: Task, known: set[str]) -> bool:
        """Whether an expert that went live in this phase has taken records of the task for its own."""
        experts = set(self._journal.live_at) - known
        replies = (self._journal.replies.get(record.position) for record in self._journal.of(task.name))
        taken = [reply for reply in replies if reply and reply.expert in experts and not reply.is_novel]
        return len(taken) >= SERVED

    def _pick(self, task: Task, earlier: Sequence[Task]) -> Task:
        returning = [old for old in earlier if self._left(old)]
        return (
            self._rng.choice(returning)
            if returning and self._rng.random() < self._pace.return_share
            else task
        )

    def _send_when_room(self, pick: Callable[[], Task]) -> None:
        """One burst, a rarer one in training, or nothing while too much is on its way; then listen."""
        count = min(self._pace.burst, self._pace.window - self._journal.outstanding)
        if self._journal.is_training and (not self._is_last or self._has_records_enough()):
            due = (self._clock.monotonic_s() - self._last_trickle_s) * self._pace.trickle_per_s
            count = count if due >= self._pace.burst else 0
        if count > 0:
            self._last_trickle_s = self._clock.monotonic_s()
            self._traffic.send([self._take(pick()) for _ in range(count)])
            self._kill_when_due("serve", self._pace.kill_serve_at)
            self._kill_when_due("learn", self._pace.kill_learn_at)
        self._traffic.hear(0.1)

    def _take(self, task: Task) -> tuple[str, str, str]:
        place = self._next[task.name] % len(task.rows)  # a task may run out in the middle of a burst
        self._next[task.name] += 1
        return (task.name, *task.rows[place])

    def _left(self, task: Task) -> int:
        return max(len(task.rows) - self._next[task.name], 0)

    def _kill_when_due(self, role: str, at: int | None) -> None:
        if at is not None and role not in self._killed and len(self._journal.sent) >= at:
            self._killed.add(role)
            self._traffic.kill(role)

    def _is_late(self) -> bool:
        return self._clock.monotonic_s() - self._started_s > self._pace.deadline_s

    def _is_enough(self) -> bool:
        """Each task has its records after its expert, one expert was consolidated, one has matured."""
        events = self._journal.events
        lived = events["expert.promoted"] > 0 and events["expert.matured"] > 0
        return self._is_late() or (lived and self._has_records_enough())

    def _has_records_enough(self) -> bool:
        newest = max(self._journal.live_at.values(), default=0)
        after = {task.name: 0 for task in self._tasks}
        for record in self._journal.sent.values():
            after[record.task] += record.order >= newest
        return min(after.values()) >= self._pace.after_records

    def _settle(self) -> None:
        """Until the last answer, or until nothing has come for a while."""
        quiet_since_s, before = self._clock.monotonic_s(), self._journal.outstanding
        while self._journal.outstanding and self._clock.monotonic_s() - quiet_since_s < 60.0:
            self._traffic.hear(0.2)
            if self._journal.outstanding != before:
                quiet_since_s, before = self._clock.monotonic_s(), self._journal.outstanding
