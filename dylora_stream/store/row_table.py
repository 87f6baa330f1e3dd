"""Kept records, as they lie in DuckDB's table `rows`."""

from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from dylora_stream.core.ledger import LedgerRow, RowState

__all__ = ["ROW_SCHEMA", "row_values", "rows_of"]

FLOATS = pa.list_(pa.float32())
ROW_TEXTS = (
    "position",
    "request_id",
    "tenant",
    "input",
    "output",
    "reason",
    "served_by",
    "state",
    "cluster_id",
    "expert_id",
    "answer",
)
ROW_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ROW_TEXTS]
    + [("choices", pa.list_(pa.string())), ("time_ms", pa.int64()), ("served_version", pa.int32())]
    + [("is_correct", pa.bool_()), ("is_trained", pa.bool_()), ("features", FLOATS), ("sketch", FLOATS)]
)


def row_values(row: LedgerRow) -> dict[str, Any]:
    """A row as one of `rows`."""
    return {field.name: getattr(row, field.name) for field in fields(row)}


def _row(values: dict[str, Any]) -> LedgerRow:
    typed = {"state": RowState(values["state"]), "choices": tuple(values["choices"] or ())}
    return LedgerRow(**values | typed)


def rows_of(batch: pa.RecordBatch) -> list[LedgerRow]:
    """Those of a batch that was read."""
    plain = batch.drop_columns(["features", "sketch"]).to_pylist()
    arrays = zip(_arrays(batch["features"]), _arrays(batch["sketch"]), strict=True)
    return [
        _row(values | {"features": features, "sketch": sketch})
        for values, (features, sketch) in zip(plain, arrays, strict=True)
    ]


def _arrays(column: pa.ListArray) -> list[np.ndarray | None]:
    """Each list as an array of its own, None for null; through Python's floats 16,000 rows take 20 s to load."""
    numbers = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    parts = np.split(numbers, ends[:-1])
    return [
        part.copy() if valid else None
        for part, valid in zip(parts, column.is_valid().to_pylist(), strict=True)
    ]
