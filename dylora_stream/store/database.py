"""Learn's memory in one DuckDB file: rows, decisions, positions and outbox, committed together.

DuckDB lets one process have the file; a second one is told which and what to do. Rows go in as Arrow tables, fifty
times faster than row by row. A write-ahead log that cannot be replayed is never deleted: the message says to move both
files aside, and what happens then.
"""

import base64
import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from dylora_stream.core.errors import DatabaseBroken, DatabaseBusy, DiskFull, SettingsError, StoreError
from dylora_stream.core.experts import Registry
from dylora_stream.core.ledger import (
    MOST_UNLABELLED,
    Changes,
    LedgerRow,
    LedgerState,
    LedgerSummary,
)
from dylora_stream.core.messages import Feedback, OutboundMessage, Topic
from dylora_stream.core.ports import Partition
from dylora_stream.store.late_answers import read_answers, write_answers
from dylora_stream.store.records import (
    CLUSTER_SCHEMA,
    JOB_SCHEMA,
    VERSION_SCHEMA,
    cluster_of,
    job_of,
    job_values,
    registry_of,
    version_values,
)
from dylora_stream.store.row_table import ROW_SCHEMA, row_values, rows_of

__all__ = ["DatabaseConfig", "DuckLedger", "database_errors"]

SCHEMA_VERSION = 2
UPGRADED_FROM = 1  # by upgrade.sql
INTERRUPTED = "Query interrupted"
ROWS_AT_ONCE = 1024  # read or written; of a backbone of width 2048 they take 48 MB
WITHOUT_IT = (
    "the samples topic rebuilds the rows and the experts stay in service; only this file knows which rows they were "
    "trained on"
)
BROKEN = (
    duckdb.IOException,
    duckdb.SerializationException,
    duckdb.InternalException,
    duckdb.FatalException,
)
LOADED = """
WITH texts AS (  -- the newest row of each text of a served expert, of those with an answer
    SELECT position, expert_id, time_ms FROM rows
    WHERE state = 'assigned' AND output IS NOT NULL AND list_contains($experts, expert_id)
    QUALIFY row_number() OVER (PARTITION BY expert_id, input ORDER BY time_ms DESC, position DESC) = 1
), newest AS (
    SELECT position FROM texts
    QUALIFY row_number() OVER (PARTITION BY expert_id ORDER BY time_ms DESC, position DESC) <= $texts
)
SELECT * FROM rows
WHERE (state <> 'unlabelled' AND ($all OR NOT is_trained))
   OR position IN (SELECT position FROM newest)
   OR position IN (SELECT unnest(positions) FROM jobs WHERE state = 'running')
   OR position IN (
       SELECT position FROM rows WHERE state = 'unlabelled' ORDER BY time_ms DESC, position DESC LIMIT $unlabelled
   )
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseConfig:
    """How much of the machine DuckDB may take."""

    memory_limit: str = "512MB"  # DuckDB's own default is 80 % of the machine
    threads: int = 1  # buffers are small; the cores belong to the model

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")


def _connected(path: Path, config: DatabaseConfig) -> duckdb.DuckDBPyConnection:
    try:
        return duckdb.connect(
            str(path), config={"memory_limit": config.memory_limit, "threads": str(config.threads)}
        )
    except duckdb.ParserException as error:  # of what it is given, the limit alone is parsed
        raise SettingsError(
            f"store.memory_limit is {config.memory_limit!r}: write it as 512MB ({error})"
        ) from error


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """DuckDB's exceptions as ours, with what to do."""
    try:
        yield
    except duckdb.Error as error:
        text = str(error)
        if "lock" in text.lower() and "conflict" in text.lower():
            raise DatabaseBusy(
                f"{path} is open in another process; stop that one, or set another store.folder ({text})"
            ) from error
        if "No space left" in text or ("disk" in text.lower() and "full" in text.lower()):
            raise DiskFull(
                f"no room left to write {path}; free some space and start again, nothing was lost"
            ) from error
        if isinstance(error, BROKEN) or "replaying WAL" in text:  # which comes as a plain duckdb.Error
            raise DatabaseBroken(
                f"{path} cannot be read: {text}. Move it and {path.name}.wal aside (do not delete them) and start "
                f"again: {WITHOUT_IT}"
            ) from error
        raise StoreError(f"{path}: {text}") from error
    except RuntimeError as error:  # it looks for signals while a statement runs, and says of Ctrl-C only this
        if str(error) == INTERRUPTED:
            raise KeyboardInterrupt from error
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(
                f"no room left to write {path}; free some space and start again, nothing was lost"
            ) from error
        raise StoreError(f"{path}: {error}") from error


class DuckLedger:
    """`core.ledger.Ledger` on DuckDB.

    Invariant: `commit` is one transaction; after a crash either all of it is there or none.
    """

    def __init__(self, path: Path, config: DatabaseConfig | None = None) -> None:
        self.path = path
        config = config or DatabaseConfig()
        with database_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connected(path, config)
            self._db.execute(_script("schema.sql"))
            self._check_version()

    def _check_version(self) -> None:
        found = self._db.execute("SELECT max(version) FROM schema_version").fetchone()
        if found is None or found[0] is None:
            self._db.execute("INSERT INTO schema_version VALUES (?)", [SCHEMA_VERSION])
        elif found[0] == UPGRADED_FROM:
            self._db.execute(_script("upgrade.sql"))
        elif found[0] != SCHEMA_VERSION:
            raise DatabaseBroken(
                f"{self.path} has schema {found[0]}, this program writes {SCHEMA_VERSION}; run the program that "
                f"wrote it, or move the file aside and start again: {WITHOUT_IT}"
            )

    def load(self, expert_texts: int | None = None) -> LedgerState:
        """See the port."""
        with database_errors(self.path):
            found = self._db.execute("SELECT document FROM registry").fetchone()
            registry = registry_of(json.loads(found[0])) if found else Registry()
            rows = self._rows(
                LOADED,
                {"unlabelled": MOST_UNLABELLED, "all": expert_texts is None}
                | {
                    "experts": [version.expert_id for version in registry.experts],
                    "texts": expert_texts or 0,
                },
            )
            clusters = [
                cluster_of(row)
                for row in self._dicts("SELECT * FROM clusters ORDER BY created_ms, cluster_id")
            ]
            jobs = [job_of(row) for row in self._dicts("SELECT * FROM jobs WHERE state = 'running'")]
            answers = read_answers(self._db)
            era = self._db.execute("SELECT max(number) FROM era").fetchone()
        return LedgerState(
            rows=tuple(sorted(rows, key=lambda row: (row.time_ms, row.position))),
            clusters=tuple(clusters),
            jobs=tuple(jobs),
            registry=registry,
            answers=answers,
            era=(era and era[0]) or 0,
        )

    def commit(self, changes: Changes) -> None:
        """See the port."""
        with database_errors(self.path):
            self._db.execute("BEGIN")
            try:
                self._apply(changes)
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(duckdb.Error):  # a COMMIT that failed has rolled back by itself
                    self._db.execute("ROLLBACK")
                raise

    def _apply(self, changes: Changes) -> None:
        self._upsert("rows", [row_values(row) for row in changes.rows.values()], ROW_SCHEMA)
        self._upsert("clusters", [asdict(cluster) for cluster in changes.clusters.values()], CLUSTER_SCHEMA)
        self._forget(changes)
        self._upsert("jobs", [job_values(job) for job in changes.jobs.values()], JOB_SCHEMA)
        if changes.jobs:  # a sketch job that has ended is asked for by nobody, and a long stream has many
            self._db.execute("DELETE FROM jobs WHERE kind = 'sketch' AND state <> 'running'")
        self._upsert("versions", [version_values(version) for version in changes.versions], VERSION_SCHEMA)
        if changes.registry is not None:
            document = json.dumps(asdict(changes.registry))
            self._db.execute("INSERT OR REPLACE INTO registry VALUES (1, ?)", [document])
        for (topic, partition), offset in changes.positions.items():
            values = [topic, partition, offset, changes.stamps.get((topic, partition))]
            self._db.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?)", values)
        if changes.era is not None:
            self._db.execute("INSERT OR REPLACE INTO era VALUES (1, ?)", [changes.era])
        write_answers(self._db, changes.answers)
        for message in changes.messages:
            headers = json.dumps(
                [[name, base64.b64encode(value).decode()] for name, value in message.headers]
            )
            self._db.execute(
                "INSERT INTO outbox (mark, topic, key, value, headers) VALUES (uuid()::VARCHAR, ?, ?, ?, ?)",
                [message.topic, message.key, message.value, headers],
            )

    def _forget(self, changes: Changes) -> None:
        for table, key, names in (
            ("rows", "position", changes.forgotten),
            ("clusters", "cluster_id", changes.ended),
        ):
            if names:
                self._db.register("gone", pa.table({"name": names}))
                self._db.execute(f"DELETE FROM {table} WHERE {key} IN (SELECT name FROM gone)")  # noqa: S608 - ours
                self._db.unregister("gone")
        for tenant, before_ms in changes.unlabelled_before_ms.items():
            self._db.execute(
                "DELETE FROM rows WHERE state = 'unlabelled' AND tenant = ? AND time_ms < ?",
                [tenant, before_ms],
            )

    def _upsert(self, table: str, values: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
        """Part by part: one statement needs memory for all that it inserts."""
        for begin in range(0, len(values), ROWS_AT_ONCE):
            incoming = pa.Table.from_pylist(list(values[begin : begin + ROWS_AT_ONCE]), schema=schema)
            self._db.register("incoming", incoming)
            self._db.execute(f"INSERT OR REPLACE INTO {table} BY NAME SELECT * FROM incoming")  # noqa: S608 - our own names
            self._db.unregister("incoming")

    def positions(self) -> dict[Partition, int]:
        """See the port."""
        with database_errors(self.path):
            found = self._db.execute("SELECT topic, part, next_offset FROM positions").fetchall()
        return {(topic, partition): offset for topic, partition, offset in found}

    def stamps(self) -> dict[Partition, int]:
        """See the port."""
        with database_errors(self.path):
            found = self._db.execute(
                "SELECT topic, part, stamp_ms FROM positions WHERE stamp_ms IS NOT NULL"
            ).fetchall()
        return {(topic, partition): stamp for topic, partition, stamp in found}

    def outbox(self) -> list[tuple[str, OutboundMessage]]:
        """See the port."""
        with database_errors(self.path):
            found = self._db.execute(
                "SELECT mark, topic, key, value, headers FROM outbox ORDER BY sequence"
            ).fetchall()
        return [
            (mark, OutboundMessage(topic=Topic(topic), key=key, value=value, headers=_headers(headers)))
            for mark, topic, key, value, headers in found
        ]

    def published(self, mark: str) -> None:
        """See the port."""
        with database_errors(self.path):
            self._db.execute(
                "DELETE FROM outbox WHERE sequence <= (SELECT sequence FROM outbox WHERE mark = ?)", [mark]
            )

    def find(self, answers: Sequence[Feedback]) -> list[LedgerRow]:
        """See the port."""
        found = self.at([str(late.position) for late in answers if late.position is not None])
        named = [late for late in answers if late.position is None]
        if named:
            query = (
                "SELECT * FROM rows WHERE (request_id, tenant) IN (SELECT unnest($ids), unnest($tenants)) "
                "QUALIFY row_number() OVER "
                "(PARTITION BY request_id, tenant ORDER BY output IS NOT NULL, time_ms DESC) = 1"
            )
            values = {"ids": [late.id for late in named], "tenants": [late.tenant for late in named]}
            with database_errors(self.path):
                found += self._rows(query, values)
        return found

    def at(self, positions: Sequence[str]) -> list[LedgerRow]:
        """See the port."""
        if not positions:
            return []
        query = "SELECT * FROM rows WHERE position IN (SELECT unnest($positions))"
        with database_errors(self.path):
            return self._rows(query, {"positions": list(positions)})

    def training_rows(self, expert_id: str, version: int) -> list[LedgerRow]:
        """See the port."""
        with database_errors(self.path):
            return self._rows(
                "SELECT rows.* FROM (SELECT unnest(positions) AS position, generate_subscripts(positions, 1) AS place "
                "FROM jobs JOIN versions USING (job_id) WHERE versions.expert_id = ? AND versions.version = ?) "
                "JOIN rows USING (position) ORDER BY place",
                [expert_id, version],
            )

    def summary(self) -> LedgerSummary:
        """See the port."""
        with database_errors(self.path):
            states = dict(
                self._db.execute("SELECT state, count(*) FROM rows GROUP BY state ORDER BY state").fetchall()
            )
            clusters = self._dicts(
                "SELECT clusters.*, count(rows.position) AS row_count, count(DISTINCT rows.input) AS distinct_inputs "
                "FROM clusters LEFT JOIN rows USING (cluster_id) GROUP BY ALL ORDER BY created_ms, cluster_id"
            )
        return LedgerSummary(rows=states, clusters=tuple(clusters))

    def close(self) -> None:
        """See the port."""
        self._db.close()

    def _dicts(self, query: str) -> list[dict[str, Any]]:
        cursor = self._db.execute(query)
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _rows(self, query: str, parameters: Sequence[Any] | Mapping[str, Any]) -> list[LedgerRow]:
        """Read batch by batch: what a start loads is more than DuckDB may take at once, and more than it may sort."""
        cursor = self._db.cursor()  # a connection of its own: results of `execute` here may be half read
        try:
            batches: Any = cursor.sql(query, params=parameters).to_arrow_reader(ROWS_AT_ONCE)
            return [row for batch in batches for row in rows_of(batch)]
        finally:
            cursor.close()


def _script(name: str) -> str:
    return files(__package__).joinpath(name).read_text()


def _headers(text: str) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, base64.b64decode(value)) for name, value in json.loads(text))
