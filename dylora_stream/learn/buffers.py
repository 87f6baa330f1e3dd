"""Where every kept row is: waiting, in a cluster's buffer, or an expert's. The curator decides, this keeps the books.

Each method that moves something writes it into the `Changes` at hand as well, so that memory and ledger move together.
Rows that nothing can come of any more are not held for ever, see `learn.retention`.

Invariant: a row is in one place: `RowState` says which, `cluster_id` and `expert_id` say whose.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dylora_stream.core.cluster_config import ClusteringConfig
from dylora_stream.core.clustering import OnlineClusters, Reference
from dylora_stream.core.events import EventType
from dylora_stream.core.ledger import Changes, ClusterRecord, ClusterState, LedgerRow, LedgerState, RowState
from dylora_stream.core.messages import Feedback, Sample
from dylora_stream.learn.lifecycle import LifecycleConfig
from dylora_stream.learn.retention import CLOSED, is_kept_on_disk, surplus
from dylora_stream.learn.rows import Rows, by_age

__all__ = ["Buffers", "Moved", "row_of"]

SLACK_ROWS, SLACK_SHARE = 1024, 0.1  # by which rows grow until it is looked again which are too many


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What placing or re-clustering did to clusters: new ones, (from, into) of those that ended, and (from, expert) of
    those whose rows were an expert's."""

    created: tuple[ClusterRecord, ...] = ()
    merged: tuple[tuple[str, str], ...] = ()
    joined: tuple[tuple[str, str], ...] = ()

    def told(self) -> Iterator[tuple[EventType, str, dict[str, Any]]]:
        """What is told of it: kind of the event, cluster, data."""
        for cluster in self.created:
            data = {"tenant": cluster.tenant, "skill": cluster.skill_id}
            yield EventType.CLUSTER_CREATED, cluster.cluster_id, data
        for source, target in self.merged:
            yield EventType.CLUSTER_MERGED, source, {"into": target}
        for source, expert_id in self.joined:
            yield EventType.CLUSTER_MERGED, source, {"into": expert_id, "reason": "came_together"}


class Buffers:
    """Rows and clusters of one learn process, all tenants."""

    def __init__(self, state: LedgerState, config: ClusteringConfig, rules: LifecycleConfig) -> None:
        self.rows = Rows(state.rows)
        self.clusters = {  # by the rules of now, not those of the process that founded them
            cluster.cluster_id: replace(cluster, rows_wanted=rules.rows_wanted(cluster.rejections))
            for cluster in state.clusters
        }
        self._config = config
        self._rules = rules
        self._crowded_at = SLACK_ROWS  # rows from which they may be too many
        self._reference: Reference | None = None
        self._online: dict[str, OnlineClusters] = {}
        self._bring_all_back()

    @property
    def reference(self) -> Reference | None:
        """What similarities are measured against; None before the first sketch job brought it."""
        return self._reference

    def refer_to(self, reference: Reference) -> None:
        """Measure similarities against this reference from now on."""
        self._reference, self._online = reference, {}
        self._bring_all_back()

    def members(self, cluster_id: str) -> list[LedgerRow]:
        """A cluster's rows that no expert has taken, oldest first."""
        kept = (RowState.CLUSTERED, RowState.SETTLED)
        return [row for row in self.rows.in_cluster(cluster_id) if row.state in kept]

    def is_ready(self, cluster: ClusterRecord) -> bool:
        """Whether its rows may become an expert: distinct ones enough, alike, not a flood.

        Texts are counted as well: one that comes with ever other answers, or looks a little different in each batch,
        is several rows to the clusters and one to a trial.
        """
        texts = {row.input for row in self.members(cluster.cluster_id) if row.output is not None}
        if len(texts) < min(cluster.rows_wanted, self._config.saturated_rows):
            return False
        return self._of(cluster.tenant).readiness(cluster.cluster_id, cluster.rows_wanted).is_ready

    def put(self, row: LedgerRow, changes: Changes) -> None:
        """A row as it is from now on."""
        changes.rows[row.position] = row
        self.rows.put(row)
        if row.state is RowState.ASSIGNED:
            self._witness(row)

    def put_cluster(self, cluster: ClusterRecord, changes: Changes) -> None:
        """A cluster as it is from now on."""
        self.clusters[cluster.cluster_id] = changes.clusters[cluster.cluster_id] = cluster

    def place(self, row: LedgerRow, changes: Changes) -> Moved:
        """A row with its sketch into the cluster it is most like, or into a new one."""
        placement = self._of(row.tenant).place(row.position, row.features, row.sketch, row.time_ms)
        created = self._found(placement.cluster_id, row, changes)
        state = self._state_in(placement.cluster_id)
        self.put(replace(row, state=state, cluster_id=placement.cluster_id), changes)
        return Moved(created=created)

    def recluster(self, tenant: str, changes: Changes) -> Moved:
        """Mend what the order of arrival got wrong; clusters keep their ids where they keep their rows."""
        result = self._of(tenant).recluster()
        created: list[ClusterRecord] = []
        for position, cluster_id in result.moves.items():
            row = replace(self.rows[position], cluster_id=cluster_id)
            created += self._found(cluster_id, row, changes)
            self.put(replace(row, state=self._state_in(cluster_id)), changes)
        for source, _ in result.merged:
            self.put_cluster(replace(self.clusters[source], state=ClusterState.MERGED), changes)
        joined = self._join(result.joined, changes)
        return Moved(created=tuple(created), merged=result.merged, joined=joined)

    def _join(self, joined: Mapping[str, str], changes: Changes) -> tuple[tuple[str, str], ...]:
        """Rows to the experts that they came with; clusters that lost all their rows so are learned."""
        left: dict[str, str] = {}
        for position, expert_id in joined.items():
            row = self.rows[position]
            if row.state is not RowState.SETTLED and row.cluster_id is not None:
                left[row.cluster_id] = expert_id
            self.assign(row, expert_id, changes)
        ended = [
            (name, expert_id)
            for name, expert_id in left.items()
            if self.clusters[name].state is not ClusterState.MERGED and not self.members(name)
        ]
        for name, expert_id in ended:
            learned = replace(self.clusters[name], state=ClusterState.LEARNED, expert_id=expert_id)
            self.put_cluster(learned, changes)
        return tuple(ended)

    def assign(self, row: LedgerRow, expert_id: str, changes: Changes, *, is_trained: bool = False) -> None:
        """The row is this expert's."""
        is_trained = row.is_trained or is_trained
        owned = replace(row, state=RowState.ASSIGNED, expert_id=expert_id, is_trained=is_trained)
        self.put(owned, changes)

    def dismiss(self, expert_id: str, rows: Mapping[str, LedgerRow]) -> None:
        """An expert is gone; its rows, as they are from now on, stand for nobody."""
        for row in rows.values():
            self.rows.put(row)
        for online in self._online.values():
            online.dismiss(expert_id)

    def settle(self, cluster_id: str, changes: Changes) -> None:
        """A cluster that will have no expert; its rows stay where they are, so that their like is recognised."""
        for row in self.members(cluster_id):
            self.put(replace(row, state=RowState.SETTLED), changes)
        self.bring_back(cluster_id)

    def take_out(self, cluster_id: str, tenant: str) -> None:
        """A cluster in training moves no more: rows that come meanwhile found another one."""
        self._of(tenant).forget([row.position for row in self.members(cluster_id)])

    def bring_back(self, cluster_id: str) -> None:
        """A cluster's rows are among those that are compared again."""
        members = self.members(cluster_id)
        if members:
            self._of(members[0].tenant).forget([row.position for row in members])
        for row in members:
            self._restore(row, cluster_id)

    def find(self, late: Feedback) -> LedgerRow | None:
        """The row that a late answer is for, by position or by the request's id."""
        if late.position is not None:
            return self.rows.get(str(late.position))
        return self.rows.of_request(late.id or "", late.tenant)

    def expire(self, now_ms: int, changes: Changes) -> None:
        """Give up clusters without a new row for too long, and rows that no answer came for, by the time of the
        tenant's own records: an old stream that is read late is not old, whoever else is live. A closed cluster is
        forgotten so too: its like is new again.

        No record is from later than `now_ms`, whatever its sender's clock says.
        """
        newest: dict[str, int] = {}
        for row in self.rows.values():
            newest[row.tenant] = max(newest.get(row.tenant, 0), row.time_ms)
        for tenant, newest_ms in newest.items():
            before_ms = min(newest_ms, now_ms) - self._rules.expire_after_ms
            changes.unlabelled_before_ms[tenant] = before_ms
            online = self._online.get(tenant)
            for position in online.expired(before_ms) if online is not None else ():
                self.put(replace(self.rows[position], state=RowState.SETTLED, cluster_id=None), changes)
                self._online[tenant].forget([position])
        for row in self.rows.in_state(RowState.UNLABELLED):
            if row.time_ms < changes.unlabelled_before_ms[row.tenant]:
                self.rows.drop(row.position)

    def tidy(self, now_ms: int, busy: Collection[str], changes: Changes) -> None:
        """Let go of rows that are too many, once a good part more have come; `busy` ones are a running job's."""
        if len(self.rows) < self._crowded_at:
            return
        self.expire(now_ms, changes)
        for row in surplus(self.rows, self.clusters, self._rules.expert_texts, busy):
            self.rows.drop(row.position)
            self._of(row.tenant).forget([row.position])
            if not is_kept_on_disk(row):
                changes.forgotten.append(row.position)
        self._end_clusters(changes)
        self._crowded_at = round(len(self.rows) * (1 + SLACK_SHARE)) + SLACK_ROWS

    def _end_clusters(self, changes: Changes) -> None:
        """Forget clusters that have lost all their rows: every outlier founds one."""
        kept = self.rows.clusters()
        for cluster in list(self.clusters.values()):
            if cluster.cluster_id not in kept and cluster.state is not ClusterState.TRAINING:
                del self.clusters[cluster.cluster_id]
                changes.ended.append(cluster.cluster_id)

    def age_s(self, now_ms: int) -> float:
        """Seconds since the oldest row that waits for an expert was sent; 0 without one."""
        waiting = [*self.rows.in_state(RowState.WAITING), *self.rows.in_state(RowState.CLUSTERED)]
        return (now_ms - min((row.time_ms for row in waiting), default=now_ms)) / 1000

    def summary(self) -> dict[str, Any]:
        """Rows by state, and each cluster with its rows; safe to call while another thread moves rows."""
        rows, clusters = self.rows.values(), list(self.clusters.values())
        inputs: dict[str | None, list[str]] = {}
        for row in rows:
            inputs.setdefault(row.cluster_id, []).append(row.input)
        described = []
        for cluster in clusters:
            mine = inputs.get(cluster.cluster_id, [])
            described.append({**asdict(cluster), "row_count": len(mine), "distinct_inputs": len(set(mine))})
        return {"rows": dict(sorted(Counter(str(row.state) for row in rows).items())), "clusters": described}

    def tenants(self) -> Sequence[str]:
        """Tenants that have rows in clusters."""
        return sorted(self._online)

    def _state_in(self, cluster_id: str) -> RowState:
        """How a row stands in this cluster."""
        return RowState.SETTLED if self.clusters[cluster_id].state in CLOSED else RowState.CLUSTERED

    def _found(self, cluster_id: str, row: LedgerRow, changes: Changes) -> tuple[ClusterRecord, ...]:
        """The record of a cluster that has none."""
        if cluster_id in self.clusters:
            return ()
        cluster = ClusterRecord(
            cluster_id=cluster_id,
            skill_id=f"s-{cluster_id}",
            tenant=row.tenant,
            state=ClusterState.OPEN,
            created_ms=row.time_ms,
            rows_wanted=self._rules.rows_wanted(0),
        )
        self.put_cluster(cluster, changes)
        return (cluster,)

    def _bring_all_back(self) -> None:
        """Every row in its place: those of experts, and those that wait, in the order in which they came.

        Rows in training are taken out again, so that the timeline has them; rows that were given up stay away.
        """
        for row in self.rows.in_state(RowState.ASSIGNED):
            self._witness(row)
        kept = [*self.rows.in_state(RowState.CLUSTERED), *self.rows.in_state(RowState.SETTLED)]
        for row in sorted(kept, key=by_age):
            if row.cluster_id in self.clusters and row.state is self._state_in(row.cluster_id):
                self._restore(row, row.cluster_id)
        for cluster in self.clusters.values():
            if cluster.state is ClusterState.TRAINING:
                self.take_out(cluster.cluster_id, cluster.tenant)

    def _restore(self, row: LedgerRow, cluster_id: str) -> None:
        self._of(row.tenant).restore(row.position, row.features, row.sketch, row.time_ms, cluster_id)

    def _witness(self, row: LedgerRow) -> None:
        """An expert has the row: what new rows are told apart from."""
        online = self._of(row.tenant)
        online.witness(row.position, row.features, row.sketch, row.time_ms, row.expert_id or "")

    def _of(self, tenant: str) -> OnlineClusters:
        if tenant not in self._online:
            self._online[tenant] = OnlineClusters(self._config, self._reference, self.clusters.keys())
        return self._online[tenant]


def row_of(sample: Sample) -> LedgerRow:
    """A sample as a row that waits."""
    return LedgerRow(
        position=str(sample.position),
        request_id=sample.id,
        tenant=sample.tenant,
        input=sample.input,
        output=sample.output,
        choices=sample.choices,
        reason=sample.reason,
        time_ms=sample.timestamp_ms,
        is_correct=sample.is_correct,
        served_by=sample.expert,
        served_version=sample.version,
        state=RowState.WAITING,
        features=sample.features,
        answer=sample.answer if sample.output is None else None,
    )
