"""Files as streams: JSONL, CSV, Parquet and plain lines become records for a topic.

    requests    a row with `input` (and `output`, `choices`, `id`, `tenant`, `skill`) is sent as a JSON request
    records     a row with `value` or `value_base64` is sent byte for byte, with its `key`, `headers`, `timestamp_ms`,
                as `record_row` writes it; bytes that are no text stand as {"base64": …}
    lines       each non-empty line of any other file is sent as plain text

What a row says is not judged here: refusing a wrong request, with a dead letter, is the daemon's part. Only what
cannot be read as its format stops the reading, with file and line.
"""

import base64
import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from dylora_stream.core.errors import DyloraError
from dylora_stream.core.messages import Headers, RawRecord
from dylora_stream.core.ports import Clock

__all__ = [
    "FileFormat",
    "FileRecord",
    "ReadOptions",
    "count_rows",
    "paced",
    "read_records",
    "record_row",
    "timed",
]

JSON_HEADERS: Headers = (("content-type", b"application/json"),)
TEXT_HEADERS: Headers = (("content-type", b"text/plain"),)
RECORD_FIELDS = frozenset({"value", "value_base64"})
BATCH_ROWS = 1024  # of a Parquet file at once
LAST_MS = 2**63 - 1  # Kafka's times have 64 bits


class FileFormat(StrEnum):
    """How a file is read."""

    AUTO = "auto"  # by the file's suffix; lines when it says nothing
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    LINES = "lines"


SUFFIXES = {
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".csv": FileFormat.CSV,
    ".parquet": FileFormat.PARQUET,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One record to send; `timestamp_ms` None leaves the time to the broker."""

    value: bytes | None
    key: bytes | None = None
    headers: Headers = ()
    timestamp_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How a file is read, and in what order."""

    format: FileFormat = FileFormat.AUTO
    key_field: str | None = (
        None  # a row's field whose text becomes the record's key; equal keys keep their order
    )
    limit: int | None = None  # records, after shuffling
    shuffle_seed: int | None = None  # None: file order; a shuffled file is held in memory


def read_records(path: Path, options: ReadOptions) -> Iterator[FileRecord]:
    """The records of a file. Raises DyloraError with file and line where it cannot be read."""
    try:
        records = _read(path, options)
        if options.shuffle_seed is not None:
            shuffled = list(records)
            random.Random(options.shuffle_seed).shuffle(shuffled)
            records = iter(shuffled)
        yield from islice(records, options.limit)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DyloraError(f"{path} cannot be read as {_format(path, options)}: {error}") from error


def record_row(record: RawRecord) -> str:
    """A record as a line of JSON that `read_records` gives back byte for byte; its position is for people."""
    row = {
        "position": str(record.position),
        **({"timestamp_ms": record.timestamp_ms} if record.timestamp_ms >= 0 else {}),
        "key": _written(record.key),
        "headers": [[name, _written(value)] for name, value in record.headers],
        "value": _written(record.value),
    }
    return json.dumps(row, ensure_ascii=False)


def count_rows(path: Path, options: ReadOptions) -> int:
    """How many records the file is about to give, for a progress bar: lines are counted, not read.

    Raises DyloraError for a Parquet file that is none.
    """
    file_format = _format(path, options)
    if file_format is FileFormat.PARQUET:
        import pyarrow.parquet as pq

        with _parquet_errors(path):
            rows = int(pq.read_metadata(path).num_rows)
    else:
        with path.open("rb") as file:
            rows = sum(bool(line.strip()) for line in file) - (file_format is FileFormat.CSV)
    return rows if options.limit is None else min(rows, options.limit)


def paced(
    records: Iterable[FileRecord], rate: float | None, clock: Clock, sleep: Callable[[float], None]
) -> Iterator[FileRecord]:
    """The records, at most `rate` a second counted from the first; None: as fast as they are taken."""
    started_s = clock.monotonic_s()
    for number, record in enumerate(records):
        wait_s = 0.0 if rate is None else started_s + number / rate - clock.monotonic_s()
        if wait_s > 0:
            sleep(wait_s)
        yield record


def timed(
    records: Iterable[FileRecord], speed: float, clock: Clock, sleep: Callable[[float], None]
) -> Iterator[FileRecord]:
    """The records with the gaps of their own times, `speed` times as fast; those without a time follow at once."""
    started_s = clock.monotonic_s()
    first_ms: int | None = None
    for record in records:
        if record.timestamp_ms is not None:
            first_ms = record.timestamp_ms if first_ms is None else first_ms
            wait_s = started_s + (record.timestamp_ms - first_ms) / 1000 / speed - clock.monotonic_s()
            if wait_s > 0:
                sleep(wait_s)
        yield record


def _format(path: Path, options: ReadOptions) -> FileFormat:
    if options.format is not FileFormat.AUTO:
        return options.format
    return SUFFIXES.get(path.suffix.lower(), FileFormat.LINES)


def _read(path: Path, options: ReadOptions) -> Iterator[FileRecord]:
    match _format(path, options):
        case FileFormat.PARQUET:
            rows = _parquet_rows(path)
        case FileFormat.CSV:
            rows = _csv_rows(path)
        case FileFormat.JSONL:
            rows = _json_rows(path)
        case _:
            yield from _lines(path)
            return
    for place, row in rows:
        yield _record(row, place, options.key_field)


def _lines(path: Path) -> Iterator[FileRecord]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield FileRecord(value=line.rstrip(b"\r\n"), headers=TEXT_HEADERS)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DyloraError(
                    f"{path}:{number} is not JSON ({error}); --format lines sends it as text"
                ) from error
            if not isinstance(row, dict):
                raise DyloraError(f"{path}:{number} is not a JSON object; --format lines sends it as text")
            yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Empty cells are absent; `choices` is a JSON list in its cell."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            place = f"{path}:{reader.line_num}"
            filled: dict[str, Any] = {name: cell for name, cell in row.items() if name and cell}
            for name in {"choices", "headers"} & filled.keys():
                try:
                    filled[name] = json.loads(filled[name])
                except ValueError as error:
                    raise DyloraError(
                        f'{place}: `{name}` must be JSON, such as ["yes", "no"] ({error})'
                    ) from error
            if "timestamp_ms" in filled and not filled["timestamp_ms"].isdecimal():
                raise DyloraError(f"{place}: `timestamp_ms` must be milliseconds since 1970")
            yield place, filled


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as pq

    with _parquet_errors(path), pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", {name: cell for name, cell in row.items() if cell is not None}


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DyloraError(f"{path} cannot be read as parquet: {error}") from error


def _record(row: Mapping[str, Any], place: str, key_field: str | None) -> FileRecord:
    try:
        return _encoded(row, place, key_field)
    except UnicodeEncodeError as error:
        raise DyloraError(f"{place} holds what is no text: {error}") from error


def _encoded(row: Mapping[str, Any], place: str, key_field: str | None) -> FileRecord:
    if "input" in row:
        record = FileRecord(
            value=json.dumps(row, ensure_ascii=False, default=str).encode(), headers=JSON_HEADERS
        )
    elif row.keys() & RECORD_FIELDS:
        record = _as_recorded(row, place)
    else:
        raise DyloraError(
            f"{place} has neither `input` nor `value`; its fields are {', '.join(map(str, row))}"
        )
    if key_field is not None:
        if key_field not in row:
            raise DyloraError(f"{place} has no field {key_field!r} to take the key from")
        record = replace(record, key=str(row[key_field]).encode())
    if record.key is None and record.value is None:
        raise DyloraError(
            f"{place} has neither key nor value, and cannot be sent: give it a key, or an empty value"
        )
    return record


def _as_recorded(row: Mapping[str, Any], place: str) -> FileRecord:
    try:
        given = row.get("headers") or {}
        headers = tuple(
            (_sendable(str(name)), _bytes(value) or b"")
            for name, value in (given.items() if isinstance(given, Mapping) else given)
        )
        value = (
            base64.b64decode(row["value_base64"], validate=True)
            if "value_base64" in row
            else _bytes(row["value"])
        )
        time_ms = _time_ms(row["timestamp_ms"]) if "timestamp_ms" in row else None
        return FileRecord(value=value, key=_bytes(row.get("key")), headers=headers, timestamp_ms=time_ms)
    except (TypeError, ValueError, OverflowError) as error:
        raise DyloraError(
            f"{place} is not a record of key, value, headers and timestamp_ms: {error}"
        ) from error


def _written(value: bytes | None) -> str | dict[str, str] | None:
    """Text where the bytes are text."""
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def _time_ms(value: Any) -> int:
    time_ms = int(value)
    if not 0 <= time_ms <= LAST_MS:
        raise ValueError(f"timestamp_ms is {time_ms}")
    return time_ms


def _sendable(text: str) -> str:
    """The text, if it can be sent. Raises UnicodeEncodeError."""
    text.encode()
    return text


def _bytes(value: Any) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, Mapping) and value.keys() == {"base64"}:
        return base64.b64decode(value["base64"], validate=True)
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value, ensure_ascii=False).encode()
