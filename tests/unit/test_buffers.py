"""The books of the learn process: who has a row, across joins, expiry and restarts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dylora_stream.core.cluster_config import ClusteringConfig
from dylora_stream.core.clustering import OnlineClusters, Reclustered, Reference
from dylora_stream.core.ledger import Changes, ClusterRecord, ClusterState, LedgerRow, LedgerState, RowState
from dylora_stream.learn.buffers import Buffers
from dylora_stream.learn.lifecycle import LifecycleConfig

DIMENSIONS, SKETCH, ROWS_WANTED = 48, 24, 40
RULES = LifecycleConfig(rows_to_seed=ROWS_WANTED, expire_after_days=500 / 86_400)
PRIOR = Reference(
    input_mean=np.zeros(DIMENSIONS), input_std=np.ones(DIMENSIONS), sketch_mean=np.zeros(SKETCH)
)


def skill(
    rng: np.random.Generator,
    name: str,
    begin_ms: int,
    rows: int,
    *,
    step_ms: int = 1000,
    scatter: float = 0.3,
) -> list[LedgerRow]:
    """Sketched rows about a random direction that no place has yet."""
    look, rule = rng.normal(size=DIMENSIONS), rng.normal(size=SKETCH)
    return [
        LedgerRow(
            position=f"{name}-{number}",
            request_id=None,
            tenant="t",
            input=f"{name} {number}",
            output="yes",
            choices=(),
            reason="novel",
            time_ms=begin_ms + step_ms * number,
            is_correct=None,
            served_by=None,
            served_version=0,
            state=RowState.WAITING,
            features=(look + scatter * rng.normal(size=DIMENSIONS)).astype(np.float32),
            sketch=(rule + scatter * rng.normal(size=SKETCH)).astype(np.float32),
        )
        for number in range(rows)
    ]


def buffers(state: LedgerState = LedgerState()) -> Buffers:  # noqa: B008 - it is frozen
    """Books opened on what a ledger has."""
    books = Buffers(state, ClusteringConfig(), RULES)
    books.refer_to(PRIOR)
    return books


def buffers_with_a_cluster() -> tuple[Buffers, ClusterRecord, LedgerRow]:
    """Books with 19 rows of one skill in one cluster, and a row of that skill which comes later."""
    books = buffers()
    *rows, later = skill(np.random.default_rng(4), "a", 0, 20)
    for row in rows:
        books.place(row, Changes())
    (cluster,) = books.clusters.values()
    return books, cluster, later


def restarted(books: Buffers) -> Buffers:
    """Other books, of the same rows and clusters, in an order of the ledger's own."""
    return buffers(
        LedgerState(rows=tuple(reversed(books.rows.values())), clusters=tuple(books.clusters.values()))
    )


def late_template(books: Buffers) -> list[LedgerRow]:
    """Two experts' rows in phases, and placed rows that look like neither and came amid the second one's."""
    rng = np.random.default_rng(13)
    for owner, begin_ms, rows in (("e-a", 0, 120), ("e-b", 120_000, 60)):
        for row in skill(rng, owner, begin_ms, rows, scatter=0.8):
            books.put(replace(row, state=RowState.ASSIGNED, expert_id=owner), Changes())
    late = skill(rng, "late", 120_500, 30, step_ms=2000)
    for row in late:
        books.place(row, Changes())
    return late


def test_rows_that_came_with_an_expert_are_its_own_and_their_cluster_has_ended() -> None:
    """In memory and in the ledger alike; told once, as a cluster that went to the expert."""
    books = buffers()
    late = late_template(books)
    names = {row.cluster_id for row in books.rows.in_state(RowState.CLUSTERED)}
    changes = Changes()
    moved = books.recluster("t", changes)
    assert {source for source, _ in moved.merged + moved.joined} == names
    assert len(moved.merged + moved.joined) == len(names)
    assert {expert for _, expert in moved.joined} == {"e-b"}
    for rows in (books.rows, changes.rows):
        found = {(rows[row.position].state, rows[row.position].expert_id) for row in late}
        assert found == {(RowState.ASSIGNED, "e-b")}
    assert {(books.clusters[name].state, changes.clusters[name].state) for name, _ in moved.joined} == {
        (ClusterState.LEARNED, ClusterState.LEARNED)
    }
    assert not books.recluster("t", Changes()).joined


def test_nothing_joins_an_expert_that_is_gone() -> None:
    """Rows that would have been its own wait for another."""
    books = buffers()
    late = late_template(books)
    owned = books.rows.of_expert("e-b")
    books.dismiss("e-b", {row.position: replace(row, state=RowState.SETTLED) for row in owned})
    assert not books.recluster("t", Changes()).joined
    assert {books.rows[row.position].state for row in late} == {RowState.CLUSTERED}
    assert not books.rows.of_expert("e-b")


def test_after_a_restart_experts_have_their_rows_and_take_in_the_same() -> None:
    """What stands for the experts comes from the ledger's assigned rows."""
    books = buffers()
    late_template(books)
    again = restarted(books)
    first, second = Changes(), Changes()
    assert books.recluster("t", first) == again.recluster("t", second)
    assert {key: row.expert_id for key, row in first.rows.items()} == {
        key: row.expert_id for key, row in second.rows.items()
    }


def test_restored_rows_stand_in_the_order_in_which_they_came() -> None:
    """Clusters that grew side by side too: the newest rows are the ones that are compared."""
    rng = np.random.default_rng(2)
    books = buffers()
    rows = skill(rng, "a", 0, 20) + skill(rng, "b", 500, 20)
    for row in sorted(rows, key=lambda row: row.time_ms):
        books.place(row, Changes())
    assert len(books.clusters) == 2
    first, second = books._online["t"], restarted(books)._online["t"]
    assert list(first._rows) == list(second._rows)
    assert first.clusters == second.clusters


def test_rows_that_were_given_up_stay_away_after_a_restart() -> None:
    """They are settled; nothing is compared with them, and they wait for no expert."""
    books = buffers()
    for row in skill(np.random.default_rng(3), "a", 0, 10):
        books.place(row, Changes())
    for row in skill(np.random.default_rng(9), "b", 1_000_000, 1):
        books.put(row, Changes())
    books.expire(2_000_000, Changes())
    again = restarted(books)
    assert not sum(len(online) for online in again._online.values())
    assert len(again.rows.in_state(RowState.SETTLED)) == 10


def test_an_old_stream_that_is_read_late_is_not_given_up() -> None:
    """Record time decides; a sender whose clock is ahead does not end everyone else's clusters."""
    books = buffers()
    for row in skill(np.random.default_rng(10), "a", 0, 10):
        books.place(row, Changes())
    books.expire(90_000_000, Changes())
    assert len(books.rows.in_state(RowState.CLUSTERED)) == 10
    for row in skill(np.random.default_rng(11), "b", 90_000_000, 1):
        books.put(row, Changes())
    books.expire(20_000, Changes())
    assert len(books.rows.in_state(RowState.CLUSTERED)) == 10


def test_rows_of_a_skill_that_needs_no_expert_are_recognised_after_a_restart() -> None:
    """Their like is settled at once."""
    books, cluster, later = buffers_with_a_cluster()
    books.put_cluster(replace(cluster, state=ClusterState.KNOWN), Changes())
    books.settle(cluster.cluster_id, Changes())
    again = restarted(books)
    again.place(later, Changes())
    assert again.rows[later.position].state is RowState.SETTLED


def test_rows_in_training_are_in_no_cluster_after_a_restart() -> None:
    """Rows that come meanwhile found another one; after a rejection the rows are back."""
    books, cluster, later = buffers_with_a_cluster()
    books.put_cluster(replace(cluster, state=ClusterState.TRAINING), Changes())
    again = restarted(books)
    assert [made.cluster_id for made in again.place(later, Changes()).created] != [cluster.cluster_id]
    assert len(again._online["t"]) == 1
    again.put_cluster(cluster, Changes())
    again.bring_back(cluster.cluster_id)
    assert len(again._online["t"]) == 20


def test_a_new_cluster_never_gets_the_id_of_one_in_training() -> None:
    """Its founding row may wait in another cluster by then, and would be taken for one that is trained on."""
    rng = np.random.default_rng(6)
    books = buffers()
    (founder,) = skill(rng, "a", 0, 1)
    books.place(founder, Changes())
    (taken,) = books.clusters.values()
    books.put_cluster(replace(taken, state=ClusterState.TRAINING), Changes())
    books.take_out(taken.cluster_id, "t")
    (made,) = books.place(founder, Changes()).created
    assert made.cluster_id != taken.cluster_id


def test_one_text_with_ever_other_answers_is_not_ready() -> None:
    """Whatever the answers' sketches say: a trial has one row of it."""
    books = buffers()
    for row in skill(np.random.default_rng(7), "a", 0, 2 * ROWS_WANTED):
        books.place(replace(row, input="the same"), Changes())
    (cluster,) = books.clusters.values()
    assert books._online["t"].readiness(cluster.cluster_id, ROWS_WANTED).is_ready
    assert not books.is_ready(cluster)


class TornCluster(OnlineClusters):
    """Says that half of a cluster's rows joined an expert, and the other half went to another cluster."""

    def recluster(self) -> Reclustered:
        """Of two clusters, the first one ends."""
        source, target = self.clusters
        left, right = self.clusters[source]
        joined: Mapping[str, str] = {left: "e-1"}
        return Reclustered(moves={right: target}, merged=((source, target),), joined=joined)


def placed_in(books: Buffers, clusters: Mapping[str, Sequence[LedgerRow]]) -> Iterable[ClusterRecord]:
    """Rows in clusters of these names."""
    torn = books._online["t"] = TornCluster(ClusteringConfig(), PRIOR)
    for name, rows in clusters.items():
        for row in rows:
            books._found(name, row, Changes())
            books.put(replace(row, state=RowState.CLUSTERED, cluster_id=name), Changes())
            torn.restore(row.position, row.features, row.sketch, row.time_ms, name)
    return books.clusters.values()


def test_a_cluster_of_which_an_expert_took_a_part_ends_once() -> None:
    """The rest went to another cluster: that is what is told, and what the ledger says."""
    books = buffers()
    rows = skill(np.random.default_rng(8), "a", 0, 3)
    placed_in(books, {"c-1": rows[:2], "c-2": rows[2:]})
    moved = books.recluster("t", Changes())
    assert (moved.merged, moved.joined) == ((("c-1", "c-2"),), ())
    assert books.clusters["c-1"].state is ClusterState.MERGED
