"""Late answers: the same whether they come with their record, after it, or before it; said where no record comes."""

from dataclasses import replace
from typing import Any

import pytest
from learning import REQUESTS, RULES, Desk, texts, told

from dylora_stream.core.events import EventType
from dylora_stream.core.experts import Maturity
from dylora_stream.core.ledger import Changes, LedgerRow, RowState
from dylora_stream.core.messages import Feedback, Position, SampleReason

DAY_S = 24 * 3600


def at(offset: int, output: str, **changes: Any) -> Feedback:
    """An answer to the record at this position, given as the clock of a new desk stands."""
    plain = Feedback(
        position=Position(REQUESTS, 0, offset), id=None, output=output, timestamp_ms=1_700_000_000_000
    )
    return replace(plain, **changes)


def named(name: str, output: str, **changes: Any) -> Feedback:
    """An answer to the record of this id."""
    return replace(at(0, output), position=None, id=name, **changes)


def unmatched(changes: Changes) -> list[tuple[str, str]]:
    """What was said of answers without a record: whose, and why."""
    return [(event.entity, event.data["reason"]) for event in told(changes, EventType.FEEDBACK_UNMATCHED)]


def facts(row: LedgerRow) -> tuple[object, ...]:
    """What does not depend on when the answer came."""
    return row.output, row.state, row.is_correct, row.expert_id, row.answer


@pytest.mark.parametrize("name", ["position", "id"])
@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("comes", ["before", "before a restart", "after", "after a restart"])
def test_an_answer_does_as_much_whenever_it_comes(
    *, name: str, is_new: bool, is_right: bool, comes: str
) -> None:
    """A record that an expert answered: with its answer at once, and with the same answer by feedback."""
    answered: dict[str, Any] = {"version": 1, "answer": " CLOUD 1\n" if is_right else "wrong"}
    answered["reason"] = SampleReason.NOVEL if is_new else SampleReason.SHARE
    text = "cloud 1" if is_new else "apple 99"
    rows = []
    for is_late in (False, True):
        desk = Desk()
        answered["expert"] = desk.grow_expert("apple")
        offset = len(desk.rows)
        late = at(offset, "CLOUD 1") if name == "position" else named(f"id-{offset}", "CLOUD 1")
        if is_late and comes.startswith("before"):
            assert not desk.hear(late).events
        if is_late and comes == "before a restart":
            desk.reopen()
        desk.take([text], output=None if is_late else "CLOUD 1", **answered)
        if is_late and comes == "after a restart":
            desk.reopen()
        if is_late and comes.startswith("after"):
            desk.hear(late)
        rows.append(desk.rows[-1])
        assert desk.ledger.load().answers == ()
    if is_new or is_right or comes.startswith("before"):
        assert facts(rows[0]) == facts(rows[1])
    else:  # it was the expert's already, and stays so
        assert (rows[1].output, rows[1].is_correct, rows[1].state) == ("CLOUD 1", False, RowState.ASSIGNED)


def test_an_expert_whose_rows_are_labelled_by_feedback_alone_grows_mature() -> None:
    """Right answers that come late count as those that come with the record do, and wrong ones too."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    share = {"expert": expert, "version": 1, "output": None, "reason": SampleReason.SHARE}
    for number in range(2 * RULES.rows_to_mature):
        offset = len(desk.rows)
        desk.take([f"apple {100 + number}"], answer="GOOD" if number % 2 else "BAD", **share)
        assert desk.curator.registry.experts[0].maturity is Maturity.NASCENT
        if number == RULES.rows_to_mature:
            desk.reopen()
        changes = desk.hear(at(offset, "GOOD"))
        if EventType.EXPERT_MATURED in changes.events:
            break
    assert desk.curator.registry.experts[0].maturity is Maturity.MATURE
    (matured,) = told(changes, EventType.EXPERT_MATURED)
    assert (matured.data["rows"], matured.data["accuracy"]) == (RULES.rows_to_mature, 0.5)


def test_a_record_that_was_passed_over_is_said_at_once() -> None:
    """Later ones of its tenant and partition were taken: this one was not kept. Over a restart too."""
    desk = Desk()
    desk.take(texts("apple", 0, 3), output=None)
    desk._offset = 10
    desk.clock.advance(1.0)
    assert not desk.hear(at(7, "x"), at(12, "y"), at(7, "z", tenant="other")).events
    assert unmatched(desk.take(["apple 10"], output=None)) == [(f"{REQUESTS}:0:7", "passed")]
    desk.reopen()
    assert unmatched(desk.hear(at(5, "x"))) == [(f"{REQUESTS}:0:5", "passed")]
    assert [late.output for late in desk.ledger.load().answers] == ["y", "z"]


def test_the_last_answer_to_a_record_counts() -> None:
    """Somebody corrected himself before it was read."""
    desk = Desk()
    desk.hear(at(0, "first"))
    desk.hear(at(0, "second"))
    desk.take(["apple 0"], output=None)
    assert desk.rows[0].output == "second"


def test_an_answer_of_another_tenant_is_nobody_s() -> None:
    """Its record is somebody else's, whether it is there or comes."""
    desk = Desk()
    desk.hear(at(0, "x", tenant="other"), named("id-0", "x", tenant="other"))
    desk.take(["apple 0"], output=None)
    assert unmatched(desk.hear(at(0, "x", tenant="other"))) == [(f"{REQUESTS}:0:0", "other_tenant")]
    assert desk.rows[0].output is None


def test_an_answer_for_which_nothing_comes_expires_by_record_time() -> None:
    """However late the stream is read; an answer without a time counts from when it was read."""
    desk = Desk()
    assert not desk.hear(named("nobody", "x"), named("undated", "y", timestamp_ms=0)).events
    desk.clock.advance(RULES.expire_after_days * DAY_S - 1)
    desk.hear(named("young", "z", timestamp_ms=desk.clock.now_ms()))
    assert not unmatched(desk.take(["apple 1"], output=None))
    desk.clock.advance(2)
    assert unmatched(desk.take(["apple 2"], output=None)) == [("nobody", "expired"), ("undated", "expired")]
    assert [late.id for late in desk.ledger.load().answers] == ["young"]


@pytest.mark.parametrize("limit", ["MOST_KEPT", "MOST_CHARACTERS"])
def test_only_so_many_answers_are_kept(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """The oldest go first, and it is said."""
    monkeypatch.setattr(f"dylora_stream.learn.late_answers.{limit}", 3)
    desk = Desk()
    assert not desk.hear(*(named(f"n-{number}", "x") for number in range(3))).events
    assert unmatched(desk.hear(named("n-3", "x"), named("n-3", "y"))) == [("n-0", "too_many")]
    assert [late.id for late in desk.ledger.load().answers] == ["n-1", "n-2", "n-3"]


def test_a_row_of_an_earlier_version_takes_its_answer() -> None:
    """What was answered is not known: nothing is said of the expert."""
    desk = Desk()
    desk.take(["apple 0"], output=None)
    row = replace(desk.rows[0], answer=None)
    desk.commit(Changes(rows={row.position: row}))
    desk.reopen()
    desk.hear(at(0, "x"))
    assert (desk.rows[0].output, desk.rows[0].is_correct, desk.rows[0].state) == ("x", None, RowState.WAITING)
