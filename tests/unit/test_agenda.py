"""What learn does next: everyone gets a turn, whatever the stream brings, and whatever its senders' clocks say."""

from collections import Counter
from dataclasses import replace

import pytest
from learning import RULES, Desk, sample, texts, told

from dylora_stream.core.events import EventType
from dylora_stream.core.ledger import JobKind, RowState
from dylora_stream.core.messages import Feedback

DAY_S = 24 * 3600.0


def do_next(desk: Desk) -> JobKind | None:
    """The next job, from beginning to end: sketches, or an expert that goes live."""
    request = desk.curator.next_job()
    if request is None:
        return None
    if request.kind is JobKind.SKETCH:
        desk.sketch()
    else:
        desk.promote(desk.start())
    return request.kind


def test_a_stream_that_always_has_rows_to_sketch_founds_experts_all_the_same() -> None:
    """New rows come as fast as they are sketched: a full buffer, and an expert with new rows, have their turns."""
    desk, done = Desk(), Counter[JobKind | None]()
    for begin in range(0, 480, 12):
        desk.take(texts("apple" if desk.curator.registry.experts == () else "bolt", begin, begin + 12))
        if desk.curator.registry.experts:
            desk.take(texts("apple", 1000 + begin, 1012 + begin))
        desk.clock.advance(1.0)
        done[do_next(desk)] += 1
    assert done[JobKind.SEED] >= 2
    assert done[JobKind.CONSOLIDATE] >= 2


def test_a_job_knows_how_often_each_text_came() -> None:
    """Repeats are not trained on, and tell how much of the traffic is new."""
    desk = Desk()
    desk.gather([*texts("apple", 0, 30), *["apple 7"] * 4])
    request = desk.curator.next_job()
    assert request is not None
    assert [request.counts.get(row.input) for row in request.rows].count(1) == len(request.rows) - 1 == 29
    assert request.counts["apple 7"] == 5


def test_experts_with_new_rows_take_turns() -> None:
    """One whose rows come faster than it is trained does not keep the others from theirs."""
    desk = Desk(replace(RULES, max_consolidate_rows=40))
    busy, quiet = desk.grow_expert("apple"), desk.grow_expert("bolt", tenant="b")
    desk.take(texts("bolt", 500, 560), expert=quiet, output="X", answer="X", tenant="b")
    trained = Counter[str]()
    for begin in range(1000, 1240, 40):
        desk.take(texts("apple", begin, begin + 40), expert=busy, output="X", answer="X")
        desk.clock.advance(120.0)
        job = desk.start()
        trained[job.expert_id or ""] += 1
        desk.promote(job)
    assert trained[quiet] >= 1
    assert trained[busy] >= 4


def test_a_record_from_next_year_is_from_now() -> None:
    """It would be the newest of its cluster until then, which would hold up every consolidation."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    year_ms = int(365 * DAY_S * 1000)
    ahead = sample("bolt 99", 5000, timestamp_ms=desk.clock.now_ms() + year_ms)
    desk.commit(desk.curator.take([ahead], [], {}))
    assert not desk.curator.knows_another(ahead)
    desk.gather(texts("bolt", 0, 12))
    desk.take(texts("apple", 100, 140), expert=expert, output="X", answer="X")
    desk.clock.advance(40 * DAY_S)
    assert do_next(desk) is JobKind.CONSOLIDATE
    assert max(row.time_ms for row in desk.rows) <= desk.clock.now_ms()


@pytest.mark.parametrize("age_days", [60, None])
def test_an_old_stream_beside_a_live_tenant_is_not_old(age_days: int | None) -> None:
    """Rows expire by their own tenant's time; records without one are from now."""
    desk = Desk()
    desk.take(["apple 1"], tenant="live")
    time_ms = 0 if age_days is None else desk.clock.now_ms() - int(age_days * DAY_S * 1000)
    rows = [
        sample(text, 100 + n, tenant="late", timestamp_ms=time_ms)
        for n, text in enumerate(texts("bolt", 0, 30))
    ]
    desk.commit(desk.curator.take(rows, [], {}))
    desk.clock.advance(5.0)
    desk.sketch()
    assert Counter(row.state for row in desk.of("bolt")) == {RowState.CLUSTERED: 30}


def test_jobs_over_the_same_rows_are_told_apart() -> None:
    """A reader that drops events of one id hears of every attempt."""
    desk, ids = Desk(), []
    desk.gather(texts("apple", 0, 30))
    for _ in range(2):
        request = desk.curator.next_job()
        assert request is not None
        started = desk.commit(desk.curator.start(request, "the-same-rows"))
        failed = desk.commit(desk.curator.failed(started.jobs["the-same-rows"], "no memory left"))
        ids += [
            told(started, EventType.TRAINING_STARTED)[0].id,
            told(failed, EventType.TRAINING_FAILED)[0].id,
        ]
        desk.clock.advance(3600.0)
    assert len(set(ids)) == len(ids)


def test_a_late_answer_is_for_the_newest_record_of_its_id() -> None:
    """Yesterday's record of the same id keeps waiting for its own."""
    desk = Desk()
    desk.take(["apple 1"], output=None, id="7")
    desk.clock.advance(DAY_S)
    desk.take(["bolt 1"], output=None, id="7")
    answer = Feedback(position=None, id="7", output="BOLT 1", timestamp_ms=desk.clock.now_ms())
    desk.hear(answer)
    assert {row.input: row.output for row in desk.rows} == {"apple 1": None, "bolt 1": "BOLT 1"}


def test_an_answer_from_next_year_does_not_keep_others_from_being_given_up() -> None:
    """It is the first of those that wait, and would be for a year."""
    desk = Desk()
    now_ms = desk.clock.now_ms()
    desk.hear(Feedback(position=None, id="ahead", output="y", timestamp_ms=now_ms + int(365 * DAY_S * 1000)))
    desk.hear(*(Feedback(position=None, id=f"n{n}", output="y", timestamp_ms=now_ms) for n in range(5)))
    desk.clock.advance(90 * DAY_S)
    assert len(told(desk.take(["apple 1"]), EventType.FEEDBACK_UNMATCHED)) == 6
