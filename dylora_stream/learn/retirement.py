"""Taking an expert out of service, because an operator says so.

Its records are the backbone's again, or the next expert's; they are novel, and may found another expert. Its own rows
are put aside and not learned from a second time: who retires an expert has seen it taught wrongly, or damaged. Its
files stay in the store.
"""

from collections.abc import Iterable
from dataclasses import replace

from dylora_stream.core.events import EventType, lifecycle_event
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry
from dylora_stream.core.ledger import Changes, LedgerRow, RowState
from dylora_stream.core.ports import Codec

__all__ = ["put_aside", "retirement"]


def retirement(
    version: ExpertVersion, registry: Registry, rows: Iterable[LedgerRow], codec: Codec, now_ms: int
) -> Changes:
    """What the ledger commits, and the workers are told: the manifest, the registry without it, the event."""
    owned = put_aside(version.expert_id, rows)
    retired, left = replace(version, maturity=Maturity.RETIRED), registry.without(version.expert_id)
    told = {"version": version.version, "maturity": version.maturity, "rows": len(owned)}
    event = lifecycle_event(EventType.EXPERT_RETIRED, version.expert_id, version.name, now_ms, told)
    return Changes(
        rows=owned,
        versions=[retired],
        registry=left,
        messages=[codec.encode_manifest(retired), codec.encode_registry(left), codec.encode_event(event)],
        events=[EventType.EXPERT_RETIRED],
    )


def put_aside(expert_id: str, rows: Iterable[LedgerRow]) -> dict[str, LedgerRow]:
    """The expert's rows by position, as they are once it is gone: no cluster's either, lest it trains them again."""
    owned = [row for row in rows if row.expert_id == expert_id and row.state is RowState.ASSIGNED]
    return {row.position: replace(row, state=RowState.SETTLED, cluster_id=None) for row in owned}
