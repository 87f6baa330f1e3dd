"""Late answers in DuckDB, within the transaction of whoever calls."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from dylora_stream.core.messages import Feedback, Position

__all__ = ["read_answers", "write_answers"]

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("target", "tenant", "position", "request_id", "output")]
    + [("time_ms", pa.int64())]
)


def write_answers(db: Any, answers: Mapping[str, Feedback | None]) -> None:
    """Keep these under their targets; forget those that are None."""
    kept = [_values(late) for late in answers.values() if late is not None]
    gone = [target for target, late in answers.items() if late is None]
    for name, table, statement in (
        (
            "gone",
            pa.table({"target": pa.array(gone, pa.string())}),
            "DELETE FROM late_answers WHERE target IN (FROM gone)",
        ),
        (
            "kept",
            pa.Table.from_pylist(kept, schema=SCHEMA),
            "INSERT OR REPLACE INTO late_answers BY NAME FROM kept",
        ),
    ):
        if table.num_rows:
            db.register(name, table)
            db.execute(statement)
            db.unregister(name)


def read_answers(db: Any) -> tuple[Feedback, ...]:
    """All that are kept, oldest first."""
    found = db.execute(
        "SELECT tenant, position, request_id, output, time_ms FROM late_answers ORDER BY time_ms, target"
    ).fetchall()
    return tuple(
        Feedback(
            position=None if position is None else Position.parse(position),
            id=request_id,
            output=output,
            tenant=tenant,
            timestamp_ms=time_ms,
        )
        for tenant, position, request_id, output, time_ms in found
    )


def _values(late: Feedback) -> dict[str, Any]:
    return {
        "target": late.target,
        "tenant": late.tenant,
        "position": None if late.position is None else str(late.position),
        "request_id": late.id,
        "output": late.output,
        "time_ms": late.timestamp_ms,
    }
