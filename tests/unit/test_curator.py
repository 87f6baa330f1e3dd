"""The curator's decisions on rows of three kinds that lie far apart."""

from dataclasses import replace

import pytest
from learning import REQUESTS, RULES, Desk, sample, texts, told

from dylora_stream.core.events import EventType
from dylora_stream.core.experts import Maturity
from dylora_stream.core.ledger import ClusterState, JobKind, RowState
from dylora_stream.core.messages import Feedback, Position, SampleReason, Topic
from dylora_stream.learn.lifecycle import FIRST_WAIT_S


def test_novel_rows_wait_until_a_sketch_job_is_worth_its_child() -> None:
    """A few rows wait; enough of them, or a few that waited long enough, ask for sketches."""
    desk = Desk()
    desk.take(texts("apple", 0, 3))
    assert {row.state for row in desk.rows} == {RowState.WAITING}
    assert desk.curator.next_job() is None
    desk.clock.advance(RULES.sketch_after_s)
    assert len(desk.start().positions) == 3
    busy = Desk()
    busy.take(texts("apple", 0, RULES.sketch_rows))
    assert busy.start().kind is JobKind.SKETCH


def test_sketched_rows_gather_by_kind() -> None:
    """Mixed rows give one cluster a kind, each announced once."""
    desk = Desk()
    desk.take([text for number in range(5) for text in (f"apple {number}", f"bolt {number}")])
    changes = desk.sketch()
    assert len(told(changes, EventType.CLUSTER_CREATED)) == 2
    owners = {kind: {row.cluster_id for row in desk.of(kind)} for kind in ("apple", "bolt")}
    assert len(owners["apple"]) == len(owners["bolt"]) == 1
    assert owners["apple"] != owners["bolt"]
    assert {row.state for row in desk.rows} == {RowState.CLUSTERED}


def test_a_row_taken_twice_is_one_row() -> None:
    """Delivered again, in one batch or in the next, it changes nothing."""
    desk = Desk()
    twice = [sample("apple 1", 7), sample("apple 1", 7)]
    desk.commit(desk.curator.take(twice, [], {}))
    assert len(desk.rows) == 1
    assert not desk.curator.take(twice, [], {}).rows


def test_a_full_buffer_seeds_an_expert_from_its_distinct_rows() -> None:
    """Exactly the cluster's rows, each input once, in the order of time; repeats do not fill a buffer."""
    desk = Desk()
    short = texts("apple", 0, RULES.rows_to_seed - 1)
    desk.gather([*short, *short[:5], *texts("bolt", 0, 9)])
    assert desk.curator.next_job() is None
    desk.gather(texts("apple", RULES.rows_to_seed - 1, RULES.rows_to_seed))
    job = desk.start()
    rows = {row.position: row for row in desk.rows}
    chosen = [rows[position] for position in job.positions]
    ordered = sorted(chosen, key=lambda row: (row.time_ms, row.position))
    assert job.kind is JobKind.SEED
    assert sorted(row.input for row in chosen) == sorted(texts("apple", 0, RULES.rows_to_seed))
    assert [row.position for row in ordered] == list(job.positions)


def test_a_job_is_announced_with_its_buffer() -> None:
    """`buffer.ready` and `training.started`, and the cluster is in training."""
    desk = Desk()
    desk.gather(texts("apple", 0, RULES.rows_to_seed))
    request = desk.curator.next_job()
    assert request is not None
    changes = desk.commit(desk.curator.start(request, "job"))
    assert changes.events == [EventType.BUFFER_READY, EventType.TRAINING_STARTED]
    assert [cluster.state for cluster in desk.clusters] == [ClusterState.TRAINING]


def test_a_promoted_expert_goes_live_manifest_first() -> None:
    """Whoever reads the registry record finds what it names; `expert.spawned` goes with it."""
    desk = Desk()
    desk.gather(texts("apple", 0, RULES.rows_to_seed))
    job = desk.start()
    changes = desk.promote(job)
    keys = [message.key for message in changes.messages if message.topic is Topic.EXPERTS]
    assert keys == [(job.expert_id or "").encode(), b"registry"]
    assert [event.entity for event in told(changes, EventType.EXPERT_SPAWNED)] == [job.expert_id]
    assert desk.ledger.load().registry.expert(job.expert_id or "") is not None
    assert [cluster.state for cluster in desk.clusters] == [ClusterState.LEARNED]
    assert {(row.state, row.expert_id, row.is_trained) for row in desk.rows} == {
        (RowState.ASSIGNED, job.expert_id, True)
    }
    assert [row.position for row in desk.ledger.training_rows(job.expert_id or "", 1)] == list(job.positions)


def test_rows_that_waited_for_the_expert_become_its_own() -> None:
    """Rows of its kind that came during the training are assigned, untrained; another kind's stay where they are."""
    desk = Desk()
    desk.gather(texts("apple", 0, RULES.rows_to_seed))
    job = desk.start()
    desk.gather([*texts("apple", 100, 120), *texts("bolt", 0, 8)])
    desk.take(texts("apple", 200, 205))
    desk.promote(job)
    late = [row for row in desk.of("apple") if row.position not in job.positions]
    taken = [row for row in late if row.state is RowState.ASSIGNED]
    assert len(taken) >= 0.8 * len(late)
    assert {(row.expert_id, row.is_trained) for row in taken} == {(job.expert_id, False)}
    assert {row.state for row in desk.of("bolt")} == {RowState.CLUSTERED}


def test_a_rejected_cluster_backs_off_and_ends_unlearnable() -> None:
    """Each rejection asks for more rows, more than a job takes even; the last one settles them and their like."""
    desk = Desk()
    sent = 0
    for attempt in range(1, RULES.max_rejections + 1):
        wanted = desk.clusters[0].rows_wanted if desk.clusters else RULES.rows_to_seed
        desk.gather(texts("apple", sent, wanted))
        sent = wanted
        job = desk.start()
        assert len(job.positions) == min(wanted, RULES.max_seed_rows)
        changes = desk.end(job, "rejected", reason="no gain")
        assert EventType.EXPERT_REJECTED in changes.events
        assert desk.clusters[0].rejections == attempt
        assert desk.curator.next_job() is None
    assert EventType.CLUSTER_UNLEARNABLE in changes.events
    assert desk.clusters[0].state is ClusterState.UNLEARNABLE
    desk.gather(texts("apple", 500, 600))
    assert {row.state for row in desk.rows} == {RowState.SETTLED}
    assert desk.curator.next_job() is None


def test_what_was_unlearnable_is_new_again_once_it_stayed_away() -> None:
    """No record of its kind for `expire_after_days`: forgotten, after a restart too; the next ones found an expert."""
    desk = Desk(replace(RULES, max_rejections=1))
    desk.gather(texts("apple", 0, RULES.rows_to_seed))
    desk.end(desk.start(), "rejected", reason="no gain")
    assert desk.clusters[0].state is ClusterState.UNLEARNABLE
    desk.clock.advance(RULES.expire_after_days * 24 * 3600 + 60)
    desk.gather(texts("bolt", 0, 3))
    desk.reopen()
    desk.gather(texts("apple", 100, 100 + RULES.rows_to_seed))
    job = desk.start()
    assert (job.kind, len(job.positions)) == (JobKind.SEED, RULES.rows_to_seed)
    assert job.cluster_id != desk.clusters[0].cluster_id


def test_a_skill_the_backbone_has_is_settled_and_so_is_its_like() -> None:
    """No expert, no second attempt; another kind is gathered as ever."""
    desk = Desk()
    desk.gather(texts("apple", 0, RULES.rows_to_seed))
    desk.end(desk.start(), "known_to_backbone")
    assert desk.clusters[0].state is ClusterState.KNOWN
    desk.gather([*texts("apple", 100, 150), *texts("bolt", 0, 5)])
    assert {row.state for row in desk.of("apple")} == {RowState.SETTLED}
    assert {row.state for row in desk.of("bolt")} == {RowState.CLUSTERED}
    assert desk.curator.next_job() is None


@pytest.mark.parametrize("decision", ["drift", "confused"])
def test_rows_that_a_neighbour_may_have_join_it(decision: str) -> None:
    """They are the neighbour's new rows; nothing was trained."""
    desk = Desk()
    neighbour = desk.grow_expert("apple")
    desk.gather(texts("bolt", 0, RULES.rows_to_seed))
    changes = desk.end(desk.start(), decision, **{"with": neighbour})
    assert told(changes, EventType.CLUSTER_MERGED)[0].data["into"] == neighbour
    assert {(row.state, row.expert_id, row.is_trained) for row in desk.of("bolt")} == {
        (RowState.ASSIGNED, neighbour, False)
    }


def test_a_neighbour_that_is_not_served_takes_nothing() -> None:
    """The cluster backs off as after any rejection."""
    desk = Desk()
    desk.gather(texts("bolt", 0, RULES.rows_to_seed))
    desk.end(desk.start(), "drift", **{"with": "e-gone"})
    assert (desk.clusters[0].state, desk.clusters[0].rejections) == (ClusterState.OPEN, 1)


def test_a_failed_job_is_no_rejection_and_is_tried_again() -> None:
    """`training.failed` carries the error; a full disk or a killed child says nothing of the rows. Longer waits each
    time, and never unlearnable; another cluster goes first meanwhile."""
    desk = Desk()
    desk.gather(texts("apple", 0, RULES.rows_to_seed))
    for failures in range(RULES.max_rejections + 2):
        job = desk.start()
        changes = desk.commit(desk.curator.failed(job, "out of memory"))
        assert told(changes, EventType.TRAINING_FAILED)[0].data["error"] == "out of memory"
        (cluster,) = desk.clusters
        assert (cluster.state, cluster.rejections) == (ClusterState.OPEN, 0)
        assert cluster.rows_wanted == RULES.rows_to_seed
        assert desk.curator.next_job() is None
        desk.clock.advance(FIRST_WAIT_S * 2**failures - 0.1)
        assert desk.curator.next_job() is None
        desk.clock.advance(0.2)
    assert desk.ledger.load().jobs == ()
    desk.commit(desk.curator.failed(desk.start(), "out of memory"))
    desk.gather(texts("bolt", 0, RULES.rows_to_seed))
    assert desk.start().cluster_id != cluster.cluster_id


def test_a_failed_consolidation_is_tried_again_with_the_same_rows() -> None:
    """After a while; no more rows are wanted than before, and one that was rejected asks for more as ever."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    known(desk, expert, 100, RULES.rows_to_consolidate)
    job = desk.start()
    desk.commit(desk.curator.failed(job, "no room left"))
    assert desk.curator.next_job() is None
    desk.clock.advance(FIRST_WAIT_S)
    assert desk.start().positions == job.positions
    desk.end(job, "rejected")
    desk.clock.advance(3600)
    assert desk.curator.next_job() is None


def fail(desk: Desk) -> int:
    """The next sketch job, which fails; how many rows it had."""
    job = desk.start()
    assert job.kind is JobKind.SKETCH
    desk.commit(desk.curator.failed(job, "no model"))
    return len(job.positions)


def test_a_failed_sketch_job_does_not_start_again_at_once() -> None:
    """A child that cannot do it is asked again with fewer rows; once one row fails, longer after each failure."""
    desk = Desk()
    desk.take(texts("apple", 0, RULES.sketch_rows))
    rows = RULES.sketch_rows
    for factor in (1, 1, 1, 1, 2, 4):
        assert fail(desk) == rows
        desk.clock.advance(factor * FIRST_WAIT_S - 0.1)
        assert desk.curator.next_job() is None
        desk.clock.advance(0.2)
        rows = max(rows // 2, 1)


def test_nothing_is_given_up_while_every_sketch_job_fails() -> None:
    """It is not the rows: once the child is able again, all of them find their clusters."""
    desk = Desk()
    desk.take(texts("apple", 0, RULES.sketch_rows))
    for _ in range(3 * RULES.sketch_rows):
        fail(desk)
        desk.clock.advance(3600)
    assert {row.state for row in desk.rows} == {RowState.WAITING}
    while desk.curator.next_job() is not None:
        desk.sketch()
        desk.clock.advance(RULES.sketch_after_s)
    assert {row.state for row in desk.rows} == {RowState.CLUSTERED}


@pytest.mark.parametrize("place", [0, 17, 29])
def test_a_row_that_cannot_be_sketched_stops_nobody(place: int) -> None:
    """Found among others by halves, tried alone twice, given up; the others are gathered as if it were not there."""
    desk = Desk()
    poison = texts("apple", 0, 30)[place]
    desk.take(texts("apple", 0, 30))
    attempts = 0
    while (request := desk.curator.next_job()) is not None:
        assert request.kind is JobKind.SKETCH
        if poison in {row.input for row in request.rows}:
            fail(desk)
        else:
            desk.sketch()
        attempts += 1
        desk.clock.advance(64 * RULES.sketch_after_s)
    states = {row.input: row.state for row in desk.rows}
    assert states.pop(poison) is RowState.SETTLED
    assert set(states.values()) == {RowState.CLUSTERED}
    assert attempts < 20


def known(desk: Desk, expert: str, begin: int, count: int, *, is_right: bool = True) -> None:
    """Teaching records that the expert answered."""
    for text in texts("apple", begin, begin + count):
        answer = text.upper() if is_right else "wrong"
        desk.take([text], expert=expert, version=1, answer=answer, reason=SampleReason.TEACHING)


def test_an_expert_is_consolidated_once_it_has_enough_new_rows() -> None:
    """Its old rows are among the job's; the new version keeps id and maturity, and is announced as promoted."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    known(desk, expert, 100, RULES.rows_to_consolidate - 1)
    assert desk.curator.next_job() is None
    known(desk, expert, 200, 1)
    job = desk.start()
    assert (job.kind, job.expert_id, job.version) == (JobKind.CONSOLIDATE, expert, 2)
    assert len(job.positions) == RULES.rows_to_seed + RULES.rows_to_consolidate
    changes = desk.promote(job)
    assert EventType.EXPERT_PROMOTED in changes.events
    version = desk.curator.registry.expert(expert)
    assert version is not None
    assert (version.version, version.parent) == (2, 1)
    assert desk.curator.next_job() is None


def test_a_buffer_that_is_filling_comes_before_consolidation() -> None:
    """What nobody knows yet is first; a buffer that gets no more rows does not hold things up."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    desk.gather(texts("bolt", 0, RULES.rows_to_seed // 4 + 1))
    known(desk, expert, 100, RULES.rows_to_consolidate)
    assert desk.curator.next_job() is None
    desk.clock.advance(RULES.filling_s + 1)
    assert desk.start().kind is JobKind.CONSOLIDATE


def test_a_changed_number_of_rows_holds_for_clusters_that_are_there() -> None:
    """Whoever lowers `rows_to_seed` because nothing comes of a kind has an expert of it after the restart."""
    desk = Desk()
    desk.gather(texts("apple", 0, RULES.rows_to_seed - 4))
    assert desk.curator.next_job() is None
    desk.rules = replace(RULES, rows_to_seed=RULES.rows_to_seed - 4)
    desk.reopen()
    desk.end(desk.start(), "rejected")
    assert [cluster.rows_wanted for cluster in desk.clusters] == [40]  # 1.5 times as many, and one


def test_a_full_pool_does_not_end_consolidation() -> None:
    """A kind that there is no place for keeps coming; the experts that there are learn on all the same."""
    desk = Desk(slots=1)
    expert = desk.grow_expert("apple")
    desk.gather(texts("bolt", 0, RULES.rows_to_seed - 1))
    known(desk, expert, 100, RULES.rows_to_consolidate)
    assert desk.start().kind is JobKind.CONSOLIDATE


def test_a_full_buffer_that_is_never_ready_does_not_end_consolidation() -> None:
    """One text again and again fills a buffer that no job will come of."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    desk.gather(["bolt 1"] * RULES.rows_to_seed)
    known(desk, expert, 100, RULES.rows_to_consolidate)
    assert desk.start().kind is JobKind.CONSOLIDATE


def test_an_attempt_in_vain_doubles_the_rows_to_the_next() -> None:
    """Rejected, consolidation waits for twice as many new rows; a success starts the count anew."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    known(desk, expert, 100, RULES.rows_to_consolidate)
    desk.end(desk.start(), "rejected")
    known(desk, expert, 200, RULES.rows_to_consolidate - 1)
    assert desk.curator.next_job() is None
    known(desk, expert, 300, 1)
    desk.promote(desk.start())
    known(desk, expert, 400, RULES.rows_to_consolidate)
    assert desk.start().kind is JobKind.CONSOLIDATE


def test_attempts_in_vain_never_end_consolidation() -> None:
    """However many were rejected: with as many new rows as a job takes, none of them tried before, the next one comes;
    with fewer it does not."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    known(desk, expert, 100, RULES.rows_to_consolidate)
    for attempt in range(1, 7):
        desk.end(desk.start(), "rejected")
        wanted = min(RULES.rows_to_consolidate << (attempt - 1), RULES.max_consolidate_rows)
        desk.clock.advance(1.0)
        known(desk, expert, 1000 * attempt, wanted - 1)
        assert desk.curator.next_job() is None
        known(desk, expert, 1000 * attempt + wanted, 1)
    assert desk.start().kind is JobKind.CONSOLIDATE


def test_a_consolidation_that_no_rows_could_fill_is_refused() -> None:
    """A job takes `max_consolidate_rows`, so more new rows than that would never come together."""
    with pytest.raises(
        ValueError, match=r"max_consolidate_rows must be at least rows_to_consolidate \(300\)"
    ):
        replace(RULES, rows_to_consolidate=300)


def test_a_retired_expert_is_out_and_its_kind_is_new_again() -> None:
    """Once; its rows are put aside, also after a restart; its kind founds another expert, from new rows alone."""
    desk = Desk()
    old = desk.grow_expert("apple")
    changes = desk.commit(desk.curator.retire(old))
    assert [event.entity for event in told(changes, EventType.EXPERT_RETIRED)] == [old]
    assert [version.maturity for version in changes.versions] == [Maturity.RETIRED]
    assert desk.ledger.load().registry.experts == ()
    assert {row.state for row in desk.rows} == {RowState.SETTLED}
    assert not desk.curator.retire(old)
    desk.reopen()
    desk.gather(texts("apple", 100, 100 + RULES.rows_to_seed))
    job = desk.start()
    assert job.expert_id != old
    rows = {row.position: row.input for row in desk.rows}
    assert all(int(rows[position].split()[1]) >= 100 for position in job.positions)


def test_rows_that_a_retired_expert_had_claimed_found_no_other() -> None:
    """Nor count for the cluster that they came in, where that lives on with the rows that were not claimed."""
    desk = Desk()
    desk.gather(texts("apple", 0, RULES.rows_to_seed))
    job = desk.start()
    desk.gather(texts("apple", 100, 140))
    desk.promote(job)
    claimed = {row.position for row in desk.rows if row.state is RowState.ASSIGNED}
    assert {cluster.state for cluster in desk.clusters} == {ClusterState.LEARNED, ClusterState.OPEN}
    desk.commit(desk.curator.retire(job.expert_id or ""))
    desk.gather(texts("apple", 200, 200 + RULES.rows_to_seed))
    again = desk.start()
    assert again.kind is JobKind.SEED
    assert not claimed & set(again.positions)


def test_a_full_pool_seeds_nothing_until_an_expert_is_retired() -> None:
    """An expert that cannot be served is not trained; it is said once, and the rows wait."""
    desk = Desk(slots=1)
    old = desk.grow_expert("apple")
    desk.take(texts("bolt", 0, RULES.rows_to_seed))
    desk.clock.advance(RULES.sketch_after_s)
    changes = desk.sketch()
    (cluster,) = [each for each in desk.clusters if each.state is ClusterState.OPEN]
    assert [event.entity for event in told(changes, EventType.CLUSTER_HELD_BACK)] == [cluster.cluster_id]
    assert desk.curator.next_job() is None
    desk.take(texts("bolt", 50, 50 + RULES.sketch_rows))
    assert not told(desk.sketch(), EventType.CLUSTER_HELD_BACK)
    desk.commit(desk.curator.retire(old))
    assert desk.start().kind is JobKind.SEED


def test_an_expert_matures_by_its_record() -> None:
    """Enough rows, enough of them right: `expert.matured`, `routing.changed`, and a registry that says so."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    known(desk, expert, 100, RULES.rows_to_mature - 1)
    assert desk.curator.registry.experts[0].maturity is Maturity.NASCENT
    text = "apple 999"
    changes = desk.take([text], expert=expert, version=1, answer=text.upper(), reason=SampleReason.TEACHING)
    assert changes.events == [EventType.EXPERT_MATURED, EventType.ROUTING_CHANGED]
    assert told(changes, EventType.ROUTING_CHANGED)[0].data["to"] == "sparse"
    assert desk.ledger.load().registry.experts[0].maturity is Maturity.MATURE
    assert not desk.take(texts("apple", 700, 701), expert=expert, version=1).events


def test_an_expert_that_answers_wrongly_stays_nascent() -> None:
    """Rows alone do not make it mature."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    known(desk, expert, 100, 3 * RULES.rows_to_mature, is_right=False)
    assert desk.curator.registry.experts[0].maturity is Maturity.NASCENT


def test_an_answer_to_a_new_kind_does_not_count_against_the_expert_that_gave_it() -> None:
    """Somebody had to answer it; wrong answers to novel records leave the track record as it is."""
    desk = Desk()
    expert = desk.grow_expert("apple")
    desk.take(texts("cloud", 0, 5 * RULES.rows_to_mature), expert=expert, version=1)
    known(desk, expert, 100, RULES.rows_to_mature)
    assert desk.curator.registry.experts[0].maturity is Maturity.MATURE


def test_a_late_answer_labels_its_row() -> None:
    """By position or by id of the request; a row that waited for its answer may then be gathered."""
    desk = Desk()
    desk.take(texts("apple", 0, 2), output=None)
    assert {row.state for row in desk.rows} == {RowState.UNLABELLED}
    position = Position(REQUESTS, 0, 0)
    desk.hear(
        Feedback(position=position, id=None, output="ONE"), Feedback(position=None, id="id-1", output="TWO")
    )
    assert [(row.state, row.output) for row in desk.rows] == [
        (RowState.WAITING, "ONE"),
        (RowState.WAITING, "TWO"),
    ]


def test_tenants_never_mix() -> None:
    """Equal rows of two tenants gather apart, and one's expert takes nothing of the other's."""
    desk = Desk()
    desk.gather(texts("apple", 0, 20), tenant="a")
    desk.gather(texts("apple", 0, 20), tenant="b")
    assert len({row.cluster_id for row in desk.rows if row.tenant == "a"}) == 1
    assert {cluster.tenant for cluster in desk.clusters} == {"a", "b"}
    assert desk.curator.next_job() is None
    expert = desk.grow_expert("apple", begin=20, tenant="a")
    assert {row.tenant for row in desk.rows if row.expert_id == expert} == {"a"}
    assert {row.state for row in desk.rows if row.tenant == "b"} == {RowState.CLUSTERED}
    desk.take(texts("apple", 300, 305), tenant="b")
    assert {row.state for row in desk.rows if row.tenant == "b"} == {RowState.CLUSTERED, RowState.WAITING}


def test_rows_that_reclustering_moves_take_their_new_clusters_state() -> None:
    """Rows that came during a training founded another cluster; once the first is closed, they settle with it."""
    desk = Desk()
    desk.gather(texts("apple", 0, RULES.rows_to_seed))
    job = desk.start()
    desk.gather(texts("apple", 100, 112))
    assert [cluster.state for cluster in desk.clusters] == [ClusterState.TRAINING, ClusterState.OPEN]
    desk.end(job, "known_to_backbone")
    desk.gather(texts("bolt", 0, 3))
    assert len({row.cluster_id for row in desk.of("apple")}) == 1
    assert {row.state for row in desk.of("apple")} == {RowState.SETTLED}
    assert {row.state for row in desk.of("bolt")} == {RowState.CLUSTERED}


def test_a_curator_from_the_ledger_decides_like_the_one_that_stopped() -> None:
    """After a restart the same rows meet the same experts, clusters, track records and next job."""
    desks = (Desk(), Desk())
    for desk in desks:
        expert = desk.grow_expert("apple")
        known(desk, expert, 100, RULES.rows_to_mature - 2)
        desk.gather([*texts("bolt", 0, 20), *texts("cloud", 0, 12)])
        desk.take(texts("bolt", 20, 24))
    desks[1].reopen()
    for desk in desks:
        known(desk, desk.curator.registry.experts[0].expert_id, 300, 2)
        desk.gather([*texts("bolt", 24, RULES.rows_to_seed), *texts("apple", 400, 410)])
        desk.start()
    first, second = ([_told(row) for row in desk.rows] for desk in desks)
    assert first == second
    assert desks[0].clusters == desks[1].clusters
    assert desks[0].ledger.load().jobs == desks[1].ledger.load().jobs != ()
    assert desks[0].curator.registry == desks[1].curator.registry
    assert desks[0].curator.registry.experts[0].maturity is Maturity.MATURE


def _told(row: object) -> tuple[object, ...]:
    names = ("position", "input", "state", "cluster_id", "expert_id", "is_trained")
    return tuple(getattr(row, name) for name in names)


def test_the_oldest_waiting_row_tells_the_buffers_age() -> None:
    """Zero without one; rows that an expert has do not wait."""
    desk = Desk()
    assert desk.curator.buffer_age_s() == 0
    desk.take(["apple 0"])
    desk.clock.advance(30)
    desk.take(["apple 1"])
    assert desk.curator.buffer_age_s() == 30


def test_new_rows_without_answers_ask_for_them() -> None:
    """`cluster.awaiting_labels` once a buffer's worth has come, and again only when it has doubled."""
    desk = Desk()
    few = desk.take(texts("apple", 0, RULES.rows_to_seed - 1), output=None)
    assert not told(few, EventType.CLUSTER_AWAITING_LABELS)
    enough = desk.take(texts("apple", RULES.rows_to_seed - 1, RULES.rows_to_seed), output=None)
    assert len(told(enough, EventType.CLUSTER_AWAITING_LABELS)) == 1
    again = desk.take(texts("apple", RULES.rows_to_seed, RULES.rows_to_seed + 1), output=None)
    assert not told(again, EventType.CLUSTER_AWAITING_LABELS)


def test_a_cluster_without_new_rows_is_given_up_by_record_time() -> None:
    """Its rows are settled once the stream is that much further; a cluster that still grows stays."""
    desk = Desk()
    desk.gather(texts("apple", 0, 5))
    desk.clock.advance(RULES.expire_after_days * 24 * 3600 + 60)
    desk.gather(texts("bolt", 0, 5))
    assert {row.state for row in desk.of("apple")} == {RowState.SETTLED}
    assert {row.state for row in desk.of("bolt")} == {RowState.CLUSTERED}
