"""Right answers that come by feedback: to their row, or kept until it comes, or given up.

Samples and feedback are two topics without an order between them, so after a pause or a rebuild an answer is often
read before its record. It is kept in the ledger, with the positions that say it was read, and joins the record when
that is taken, as if it had come with it. Told as `feedback.unmatched`, with a reason, is

    passed        a later record of the same tenant and partition was taken: serve writes samples in the order of the
                  requests, so this one was not kept for learning. The usual case, said at once
    expired       an answer that names an id, for which order says nothing: records have been taken that were sent
                  `lifecycle.expire_after_days` after it
    too_many      the oldest of more than `MOST_KEPT`, or of more than `MOST_CHARACTERS`
    other_tenant  its record is somebody else's
"""

from collections.abc import Iterable
from dataclasses import replace

from dylora_stream.core.experts import Registry
from dylora_stream.core.ledger import Changes, LedgerRow, LedgerState, RowState
from dylora_stream.core.messages import Feedback, Position, Sample, is_right
from dylora_stream.core.ports import Clock
from dylora_stream.learn.buffers import Buffers
from dylora_stream.learn.eras import without_era

__all__ = ["LateAnswers"]

MOST_KEPT = 65_536  # answers without a row, some 50 MB where they are short
MOST_CHARACTERS = 16 * 2**20  # of all of them together

Stream = tuple[str, str, int]  # tenant, topic, partition: records of one come in the order of their offsets


class LateAnswers:
    """What feedback said, beside the rows that it is for."""

    def __init__(self, state: LedgerState, buffers: Buffers, clock: Clock, expire_after_ms: int) -> None:
        self._buffers, self._clock = buffers, clock
        self._expire_after_ms = expire_after_ms
        self._kept: dict[str, Feedback] = {}  # by target, in order of arrival
        self._characters = 0
        self._awaited: dict[Stream, dict[str, int]] = {}  # target → offset, of those that name a position
        self._passed: dict[Stream, int] = {}  # the offset that was taken last
        self._newest_ms = 0  # of the records taken
        self._hopeless: list[tuple[Feedback, str]] = []
        for row in state.rows:
            self._pass(row.tenant, Position.parse(row.position), row.time_ms)
        for late in state.answers:
            self._keep(late)

    def remembers(self, late: Feedback) -> bool:
        """Whether the row that a late answer is for is at hand."""
        return self._buffers.find(late) is not None

    def recall(self, row: LedgerRow) -> None:
        """A row out of the ledger that has been waiting for an answer for long is at hand again."""
        if row.state is RowState.UNLABELLED:
            self._buffers.rows.put(row)

    def complete(self, samples: Iterable[Sample], changes: Changes) -> list[Sample]:
        """The samples, with the answers that came before them."""
        completed = []
        for sample in samples:
            named = [Feedback(position=sample.position, id=None, output="", tenant=sample.tenant)]
            if sample.id is not None:
                named.append(replace(named[0], position=None, id=sample.id))
            found = [self._let_go(each.target, changes) for each in named if each.target in self._kept]
            is_complete = sample.output is not None or not found
            completed.append(sample if is_complete else replace(sample, output=found[0].output))
            self._pass(sample.tenant, sample.position, sample.timestamp_ms)
        return completed

    def take(self, late: Feedback, registry: Registry, changes: Changes) -> LedgerRow | None:
        """An answer joins its row, which is returned where it had none; without its row it is kept.

        What the row says of the expert that answered it, and whose it is, is as if the answer had come with it.
        """
        row = self._buffers.find(late)
        if row is None:
            if late.target in self._kept:
                self._let_go(late.target, changes)
            now_ms = self._clock.now_ms()
            dated = replace(late, timestamp_ms=min(late.timestamp_ms or now_ms, now_ms))
            self._keep(dated)
            changes.answers[late.target] = dated
            return None
        if row.tenant != late.tenant:
            self._hopeless.append((late, "other_tenant"))
        if row.tenant != late.tenant or row.output is not None:
            return None
        is_correct = None if row.answer is None else is_right(row.answer, late.output)
        labelled = replace(row, output=late.output, is_correct=is_correct, answer=None)
        if row.state is RowState.UNLABELLED:
            labelled = replace(labelled, state=RowState.WAITING)
            if is_correct and registry.expert(row.served_by or "") is not None:
                labelled = replace(labelled, state=RowState.ASSIGNED, expert_id=row.served_by)
        self._buffers.put(labelled, changes)
        return labelled

    def give_up(self, changes: Changes) -> list[tuple[str, Feedback, str]]:
        """Answers that no row will come for: the request as its sender named it, the answer, and why not.

        No record is from later than now, whatever its sender's clock says.
        """
        given_up, self._hopeless = self._hopeless, []
        before_ms = min(self._newest_ms, self._clock.now_ms()) - self._expire_after_ms
        passed = [
            target
            for stream, awaited in self._awaited.items()
            for target, offset in awaited.items()
            if offset <= self._passed.get(stream, -1)
        ]
        given_up += [(self._let_go(target, changes), "passed") for target in passed]
        while self._kept and self._oldest().timestamp_ms < before_ms:
            given_up.append((self._let_go(self._oldest().target, changes), "expired"))
        while len(self._kept) > MOST_KEPT or self._characters > MOST_CHARACTERS:
            given_up.append((self._let_go(self._oldest().target, changes), "too_many"))
        return [
            (str(without_era(late.position) if late.position else late.id), late, reason)
            for late, reason in given_up
        ]

    def _oldest(self) -> Feedback:
        return next(iter(self._kept.values()))

    def _keep(self, late: Feedback) -> None:
        self._kept[late.target] = late
        self._characters += len(late.output)
        if late.position is not None:
            self._awaited.setdefault(_stream(late.tenant, late.position), {})[late.target] = (
                late.position.offset
            )

    def _let_go(self, target: str, changes: Changes) -> Feedback:
        """Kept no longer, neither here nor in the ledger."""
        changes.answers[target] = None
        late = self._kept.pop(target)
        self._characters -= len(late.output)
        if late.position is not None:
            del self._awaited[_stream(late.tenant, late.position)][target]
        return late

    def _pass(self, tenant: str, position: Position, time_ms: int) -> None:
        """The newest record of its stream; offsets that fall begin anew, with the topic."""
        self._passed[_stream(tenant, position)] = position.offset
        self._newest_ms = max(self._newest_ms, time_ms)


def _stream(tenant: str, position: Position) -> Stream:
    return tenant, position.topic, position.partition
