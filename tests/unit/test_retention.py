"""Learn holds no more rows than it has use for, however long it runs."""

from dataclasses import replace

import numpy as np
import pytest
from learning import RULES, Desk, sample, texts

from dylora_stream.core.ledger import ClusterRecord, ClusterState, LedgerRow, RowState
from dylora_stream.core.messages import Feedback, SampleReason
from dylora_stream.learn import retention
from dylora_stream.learn.buffers import row_of
from dylora_stream.learn.retention import surplus
from dylora_stream.learn.rows import Rows


def row(number: int, **changes: object) -> LedgerRow:
    """A row of its own text, a second after the one before."""
    plain = row_of(sample(f"apple {number}", number, timestamp_ms=1000 * number))
    return replace(plain, **changes)  # type: ignore[arg-type]


def cluster(name: str, state: ClusterState) -> ClusterRecord:
    """A cluster in a state."""
    return ClusterRecord(
        cluster_id=name, skill_id="s", tenant="default", state=state, created_ms=0, rows_wanted=30
    )


def numbers(rows: list[LedgerRow]) -> list[int]:
    """Their numbers, in order."""
    return sorted(int(each.input.split()[1]) for each in rows)


def test_an_expert_keeps_the_newest_rows_of_its_newest_texts() -> None:
    """A text that comes again and again is one row, the newest; so are the texts that came before the others."""
    own = [row(n, state=RowState.ASSIGNED, expert_id="e") for n in range(6)]
    again = [replace(own[5], position=f"again:0:{n}", time_ms=10_000 + n) for n in range(3)]
    gone = surplus(Rows([*own, *again]), {}, 4, ())
    assert {each.position for each in gone} == {each.position for each in [*own[:2], own[5], *again[:2]]}


def test_rows_without_an_answer_displace_none_with_one() -> None:
    """Not by being newer, nor by repeating its text; the newest of them wait for a late answer."""
    taught = [row(n, state=RowState.ASSIGNED, expert_id="e") for n in range(3)]
    known = [row(n, state=RowState.ASSIGNED, expert_id="e", output=None) for n in range(10, 18)]
    repeated = replace(known[7], position="again:0:1", input=taught[0].input, time_ms=20_000)
    gone = surplus(Rows([*taught, *known, repeated]), {}, 6, ())
    assert {each.position for each in gone} == {each.position for each in known[:7]}


def test_rows_of_a_running_job_stay() -> None:
    """Whatever else came meanwhile."""
    own = [row(n, state=RowState.ASSIGNED, expert_id="e") for n in range(6)]
    assert numbers(surplus(Rows(own), {}, 4, {own[0].position})) == [1]


def test_clusters_that_nobody_feeds_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A young cluster's old rows outlive an old cluster's newer ones; one in training loses nothing."""
    monkeypatch.setattr(retention, "MOST_WAITING", 4)
    states = {"old": ClusterState.OPEN, "young": ClusterState.OPEN, "training": ClusterState.TRAINING}
    members = {"old": [1, 2, 3], "young": [0, 9], "training": [4, 5]}
    rows = [row(n, state=RowState.CLUSTERED, cluster_id=name) for name, own in members.items() for n in own]
    clusters = {name: cluster(name, state) for name, state in states.items()}
    assert numbers(surplus(Rows([*rows, row(10), row(11)]), clusters, 4, ())) == [1, 2, 3]


def test_a_tenant_that_floods_displaces_its_own_rows_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet tenant's cluster goes on filling, whatever a loud one sends; what it leaves is the others'."""
    monkeypatch.setattr(retention, "MOST_WAITING", 10)
    quiet = [row(n, tenant="quiet") for n in range(3)]
    loud = [row(n, tenant=("loud", "louder")[n % 2]) for n in range(10, 22)]
    assert numbers(surplus(Rows([*quiet, *loud]), {}, 4, ())) == [10, 11, 12, 13, 14, 15]
    assert numbers(surplus(Rows([*quiet, *loud[:7]]), {}, 4, ())) == []


def test_what_expired_goes_and_what_is_recognised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settled rows of a skill that the backbone has stand for it, as many as are compared."""
    monkeypatch.setattr(retention, "MOST_SETTLED", 2)
    clusters = {"known": cluster("known", ClusterState.KNOWN), "gone": cluster("gone", ClusterState.OPEN)}
    rows = [row(n, state=RowState.SETTLED, cluster_id="known") for n in range(3)]
    rows += [row(n, state=RowState.SETTLED, cluster_id="gone") for n in range(3, 5)]
    assert numbers(surplus(Rows(rows), clusters, 4, ())) == [0, 3, 4]


def test_a_row_is_found_by_each_of_its_keys_whatever_became_of_it() -> None:
    """State, cluster, owner, request; a dropped row by none."""
    rows = Rows([row(1), row(2)])
    moved = row(1, state=RowState.ASSIGNED, cluster_id="c", expert_id="e")
    rows.put(moved)
    assert numbers(rows.in_state(RowState.WAITING)) == [2]
    for found in (rows.in_state(RowState.ASSIGNED), rows.in_cluster("c"), rows.of_expert("e")):
        assert numbers(found) == [1]
    assert rows.of_request("id-1", "default") is moved
    assert rows.of_request("id-1", "acme") is None
    rows.drop(moved.position)
    assert len(rows) == 1
    assert not rows.in_state(RowState.ASSIGNED) + rows.in_cluster("c") + rows.of_expert("e")
    assert rows.of_request("id-1", "default") is None


def test_a_long_stream_does_not_grow_the_process_or_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known records by the thousand: the newest stay, and in the ledger those that the expert was trained on."""
    monkeypatch.setattr("dylora_stream.learn.buffers.SLACK_ROWS", 64)
    desk = Desk()
    expert = desk.grow_expert("apple")
    trained = [each.position for each in desk.ledger.training_rows(expert, 1)]
    for begin in range(1000, 3000, 100):
        right = {"output": "x", "answer": "x", "expert": expert, "reason": SampleReason.TEACHING}
        desk.clock.advance(1.0)
        desk.take(texts("apple", begin, begin + 100), **right)
    limit = 2 * RULES.max_consolidate_rows
    assert len(desk.curator._buffers.rows) <= (1 + 0.1) * (limit + 100) + 64
    assert len(desk.rows) <= (1 + 0.1) * (limit + len(trained) + 100) + 64
    assert [each.position for each in desk.ledger.training_rows(expert, 1)] == trained
    assert max(numbers(list(desk.rows))) == 2999


def test_clusters_go_with_the_last_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each outlier founds a cluster; those of rows that are held no more are forgotten, here and in the ledger."""
    monkeypatch.setattr("dylora_stream.learn.buffers.SLACK_ROWS", 64)
    monkeypatch.setattr(retention, "MOST_WAITING", 100)
    desk = Desk()
    rng = np.random.default_rng(0)
    for begin in range(0, 1000, 50):
        for text in texts("apple", begin, begin + 50):
            desk.take([text], features=rng.standard_normal(16).astype(np.float32))
        job = desk.start()
        sketches = {position: rng.standard_normal(8).astype(np.float32) for position in job.positions}
        desk.commit(desk.curator.sketched(job, sketches))
        desk.clock.advance(60.0)
    desk.take([])
    assert {each.cluster_id for each in desk.rows if each.cluster_id} <= {c.cluster_id for c in desk.clusters}
    assert len(desk.clusters) < 400
    assert set(desk.curator._buffers.clusters) == {cluster.cluster_id for cluster in desk.clusters}


def test_a_very_late_answer_finds_its_row_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held no more and was not deleted; recalled, it waits for an expert like any other."""
    monkeypatch.setattr("dylora_stream.learn.buffers.SLACK_ROWS", 8)
    monkeypatch.setattr(retention, "MOST_UNLABELLED", 20)
    desk = Desk()
    for begin in range(0, 200, 20):
        desk.take(texts("apple", begin, begin + 20), output=None)
    late = Feedback(position=None, id="id-3", output="APPLE 3")
    assert not desk.curator.late.remembers(late)
    assert len(desk.rows) == 200
    (found,) = desk.ledger.find([late])
    assert found is not None
    desk.curator.late.recall(found)
    desk.hear(late)
    (labelled,) = [each for each in desk.rows if each.output is not None]
    assert (labelled.input, labelled.state) == ("apple 3", RowState.WAITING)
    assert np.array_equal(labelled.features, found.features)
