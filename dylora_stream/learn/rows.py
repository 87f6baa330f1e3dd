"""The rows that learn has in memory, found by position, state, cluster, owner and request without a search."""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace

from dylora_stream.core.ledger import LedgerRow, RowState
from dylora_stream.core.messages import Sample

__all__ = ["Rows", "by_age", "dated", "is_another"]

Table = dict[str, LedgerRow]  # by position


def by_age(row: LedgerRow) -> tuple[int, str]:
    """Sorts rows, oldest first."""
    return row.time_ms, row.position


def dated(sample: Sample, now_ms: int) -> Sample:
    """A sample without a time that can be right is from now: one from next year would be the newest of all rows until
    then, and hold up whatever asks for the newest."""
    return sample if _has_time(sample, now_ms) else replace(sample, timestamp_ms=now_ms)


def is_another(row: LedgerRow, sample: Sample, now_ms: int) -> bool:
    """Whether a row at a sample's position is another record's; times say so only where they can be right."""
    return row.input != sample.input or (_has_time(sample, now_ms) and row.time_ms != sample.timestamp_ms)


def _has_time(sample: Sample, now_ms: int) -> bool:
    """Whether its sender's clock can be right; a producer may also give none."""
    return 0 < sample.timestamp_ms <= now_ms


class Rows:
    """A row a position. Lists are copies, so another thread may read while rows move."""

    def __init__(self, rows: Iterable[LedgerRow] = ()) -> None:
        self._all: Table = {}
        self._states: dict[RowState, Table] = {state: {} for state in RowState}
        self._clusters: dict[str, Table] = {}
        self._owners: dict[str, Table] = {}
        self._requests: dict[tuple[str, str], Table] = {}
        for row in rows:
            self.put(row)

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, position: str) -> bool:
        return position in self._all

    def __getitem__(self, position: str) -> LedgerRow:
        return self._all[position]

    def get(self, position: str) -> LedgerRow | None:
        """The row, or None."""
        return self._all.get(position)

    def values(self) -> list[LedgerRow]:
        """All of them, in the order in which they came first."""
        return list(self._all.values())

    def put(self, row: LedgerRow) -> None:
        """A new row, or what became of one."""
        before = self._all.get(row.position)
        if before is not None:
            self._unlist(before)
        self._all[row.position] = row
        for table in self._tables(row):
            table[row.position] = row

    def drop(self, position: str) -> None:
        """The row is remembered no more."""
        self._unlist(self._all.pop(position))

    def in_state(self, state: RowState) -> list[LedgerRow]:
        """Oldest first."""
        return sorted(self._states[state].values(), key=by_age)

    def in_cluster(self, cluster_id: str) -> list[LedgerRow]:
        """Oldest first, whatever their state."""
        return sorted(self._clusters.get(cluster_id, {}).values(), key=by_age)

    def clusters(self) -> AbstractSet[str]:
        """Clusters that have rows."""
        return self._clusters.keys()

    def of_expert(self, expert_id: str) -> list[LedgerRow]:
        """Rows that are this expert's, oldest first."""
        return sorted(self._owners.get(expert_id, {}).values(), key=by_age)

    def owners(self) -> list[str]:
        """Experts that have rows."""
        return sorted(expert_id for expert_id, table in self._owners.items() if table)

    def of_request(self, request_id: str, tenant: str) -> LedgerRow | None:
        """The newest row of a request with this id, one without a right answer before all others: a sender may use an
        id again."""
        rows = self._requests.get((tenant, request_id), {}).values()
        return max(rows, key=lambda row: (row.output is None, *by_age(row)), default=None)

    def _tables(self, row: LedgerRow) -> list[Table]:
        """Where the row is listed."""
        tables = [self._states[row.state]]
        if row.cluster_id is not None:
            tables.append(self._clusters.setdefault(row.cluster_id, {}))
        if row.state is RowState.ASSIGNED and row.expert_id is not None:
            tables.append(self._owners.setdefault(row.expert_id, {}))
        if row.request_id is not None:
            tables.append(self._requests.setdefault((row.tenant, row.request_id), {}))
        return tables

    def _unlist(self, row: LedgerRow) -> None:
        for table in self._tables(row):
            table.pop(row.position, None)
        if not self._clusters.get(row.cluster_id or "", True):
            del self._clusters[row.cluster_id or ""]
        request = (row.tenant, row.request_id or "")
        if not self._requests.get(request, True):
            del self._requests[request]
