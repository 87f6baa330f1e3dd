"""Which rows learn stops holding in memory, so that a daemon that runs for months stays as large as it was.

    an expert's rows     the newest of each of the newest distinct texts, twice as many as a consolidation takes, and a
                         third as many of which no answer came: known traffic without one does not displace what teaches
    without an answer    the newest `MOST_UNLABELLED`; older ones wait in the ledger for a late answer
    waiting for one      the newest `MOST_WAITING`; clusters that got a row most recently keep theirs longest
    settled              the newest `MOST_SETTLED` of skills that are recognised; the others at once

The last two are shared out among tenants: one that sends much displaces its own rows before another's.

With a backbone of width 576 a row has 2,797 numbers and its answer 1,345, float32, 16.6 KB: 260 MB at each of the two
larger limits. What was trained on stays in the ledger for ever, see `Ledger.training_rows`; a start loads of it what
would be held.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from dylora_stream.core.ledger import MOST_UNLABELLED, ClusterRecord, ClusterState, LedgerRow, RowState
from dylora_stream.learn.rows import Rows, by_age

__all__ = ["CLOSED", "MOST_SETTLED", "MOST_WAITING", "is_kept_on_disk", "surplus"]

MOST_WAITING = 16_384
UNLABELLED_PART = 3  # of an expert's texts: one more for as many with an answer
MOST_SETTLED = 2_048  # what clusters compare a new row with
CLOSED = (ClusterState.KNOWN, ClusterState.UNLEARNABLE)  # recognised, but without an expert


def surplus(
    rows: Rows, clusters: Mapping[str, ClusterRecord], per_expert: int, busy: Collection[str]
) -> list[LedgerRow]:
    """Rows to be held no more; `busy` positions are a running job's, and stay."""
    found = [
        *(row for expert_id in rows.owners() for row in _of_expert(rows.of_expert(expert_id), per_expert)),
        *_all_but_newest(rows.in_state(RowState.UNLABELLED), MOST_UNLABELLED),
        *_all_but_freshest([*rows.in_state(RowState.WAITING), *_in_open_clusters(rows, clusters)]),
        *_settled(rows.in_state(RowState.SETTLED), clusters),
    ]
    return [row for row in found if row.position not in busy]


def is_kept_on_disk(row: LedgerRow) -> bool:
    """Whether the ledger keeps a row that is held no more: a version was trained on it, or it may get an answer."""
    return row.is_trained or row.state is RowState.UNLABELLED


def _of_expert(owned: Sequence[LedgerRow], texts: int) -> Iterable[LedgerRow]:
    """Those with an answer and those without are counted apart."""
    yield from _repeated_or_old([row for row in owned if row.output is not None], texts)
    yield from _repeated_or_old([row for row in owned if row.output is None], texts // UNLABELLED_PART)


def _repeated_or_old(owned: Sequence[LedgerRow], kept: int) -> Iterable[LedgerRow]:
    """All but the newest row of each of the `kept` newest texts; owned: oldest first."""
    newest = {row.input: row.position for row in owned}
    last = sorted((row for row in owned if newest[row.input] == row.position), key=by_age)[-kept:]
    staying = {row.position for row in last}
    return (row for row in owned if row.position not in staying)


def _all_but_newest(rows: Sequence[LedgerRow], kept: int) -> Sequence[LedgerRow]:
    return rows[: max(len(rows) - kept, 0)]


def _beyond(limit: int, rows: Iterable[LedgerRow]) -> list[LedgerRow]:
    """All but the last `limit`, of each tenant as many as its part allows; rows: those to keep longest last."""
    owned: dict[str, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        owned[row.tenant].append(row)
    part = _part(limit, [len(mine) for mine in owned.values()])
    return [row for mine in owned.values() for row in _all_but_newest(mine, part)]


def _part(limit: int, wanted: Sequence[int]) -> int:
    """The most that each may have so that all together have `limit`: who wants less leaves more to the others."""
    for asking, least in zip(range(len(wanted), 0, -1), sorted(wanted), strict=True):
        if least * asking > limit:
            return limit // asking
        limit -= least
    return max(wanted, default=0)


def _in_open_clusters(rows: Rows, clusters: Mapping[str, ClusterRecord]) -> list[LedgerRow]:
    """Clustered rows but for those in training."""
    return [
        row
        for row in rows.in_state(RowState.CLUSTERED)
        if clusters[row.cluster_id or ""].state is not ClusterState.TRAINING
    ]


def _all_but_freshest(waiting: Sequence[LedgerRow]) -> list[LedgerRow]:
    """The rows of the clusters that have waited longest for another row, and of those the oldest."""
    fed: dict[str, int] = {}
    for row in waiting:
        group = row.cluster_id or row.position
        fed[group] = max(fed.get(group, row.time_ms), row.time_ms)
    ordered = sorted(waiting, key=lambda row: (fed[row.cluster_id or row.position], *by_age(row)))
    return _beyond(MOST_WAITING, ordered)


def _settled(rows: Sequence[LedgerRow], clusters: Mapping[str, ClusterRecord]) -> list[LedgerRow]:
    """All that expired or were a retired expert's, and the oldest of the others."""
    closed = {name for name, cluster in clusters.items() if cluster.state in CLOSED}
    given_up = [row for row in rows if row.cluster_id not in closed]
    return given_up + _beyond(MOST_SETTLED, (row for row in rows if row.cluster_id in closed))
