"""One contract for learn's memory, over DuckDB and over the in-memory double; then what only a file can do."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import duckdb
import numpy as np
import pytest
from learning import CODEC

from dylora_stream.core.errors import DatabaseBroken, DatabaseBusy, DiskFull, SettingsError
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.ledger import (
    Changes,
    ClusterRecord,
    ClusterState,
    JobKind,
    JobRecord,
    JobState,
    Ledger,
    LedgerRow,
    RowState,
)
from dylora_stream.core.messages import Feedback, OutboundMessage, Position, Topic
from dylora_stream.store.database import DatabaseConfig, DuckLedger, database_errors
from dylora_stream.testing import MemoryLedger

Reload = Callable[[Ledger], Ledger]

WRITER = """
import os, signal, sys
from pathlib import Path
from dylora_stream.core.ledger import Changes
from dylora_stream.core.messages import OutboundMessage, Topic
from dylora_stream.store.database import DuckLedger
ledger = DuckLedger(Path(sys.argv[1]))
message = OutboundMessage(topic=Topic.EVENTS, key=b"k", value=b"v")
ledger.commit(Changes(messages=[message] * 3, positions={("samples", 0): 7}))
for mark, _ in ledger.outbox()[:int(sys.argv[2])]:
    ledger.published(mark)
print("committed", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["duck", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """Both implementations, empty."""
    return DuckLedger(tmp_path / "learn.duckdb") if request.param == "duck" else MemoryLedger()


def reloaded(ledger: Ledger) -> Ledger:
    """The same memory after a restart: the file opened anew; the double has nothing to reopen."""
    if isinstance(ledger, DuckLedger):
        ledger.close()
        return DuckLedger(ledger.path)
    return ledger


def row(number: int, **changes: object) -> LedgerRow:
    """A row with something in every field."""
    plain = LedgerRow(
        position=f"requests:0:{number}",
        request_id=f"id-{number}",
        tenant="default",
        input=f"input {number} é",
        output="right",
        choices=("right", "wrong"),
        reason="novel",
        time_ms=1_700_000_000_000 + number,
        is_correct=False,
        served_by="e-1",
        served_version=2,
        state=RowState.WAITING,
        features=np.linspace(-1, number, 5, dtype=np.float32),
        answer="an answer",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def version(number: int, job: str) -> ExpertVersion:
    """A version of one expert."""
    return ExpertVersion(
        expert_id="e-1",
        skill_id="s-1",
        version=number,
        parent=number - 1 or None,
        storage=StoredFolder(path=f"ab/{number}", sha256=f"{number}" * 4),
        maturity=Maturity.NASCENT,
        lora_config={"r": 8, "target_modules": ["q", "v"]},
        trained_on={"job": job, "rows": 3},
        metrics={"loss_new": 0.25},
        prompt_template="{input}",
    )


def job(job_id: str, *numbers: int, state: JobState = JobState.RUNNING) -> JobRecord:
    """A job with these rows, in this order."""
    return JobRecord(
        job_id=job_id,
        kind=JobKind.SEED,
        tenant="default",
        created_ms=5,
        positions=tuple(f"requests:0:{number}" for number in numbers),
        state=state,
        cluster_id="c-1",
        expert_id="e-1",
        version=1,
        report={"decision": "promoted", "heldout": {"rows": 3}},
    )


def cluster(name: str) -> ClusterRecord:
    """An open cluster."""
    return ClusterRecord(
        cluster_id=name,
        skill_id=f"s-{name}",
        tenant="default",
        state=ClusterState.OPEN,
        created_ms=1,
        rows_wanted=48,
    )


def messages(*values: bytes) -> list[OutboundMessage]:
    """Messages to the events topic."""
    return [OutboundMessage(topic=Topic.EVENTS, key=b"k", value=value) for value in values]


def assert_same_rows(found: list[LedgerRow], wanted: list[LedgerRow]) -> None:
    """Field by field, arrays by type and value."""
    assert [each.position for each in found] == [each.position for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        for name in (field.name for field in fields(LedgerRow)):
            left, right = getattr(one, name), getattr(other, name)
            if isinstance(right, np.ndarray):
                assert left.dtype == np.float32
                np.testing.assert_array_equal(left, right)
            else:
                assert left == right
                assert type(left) is type(right)


def test_rows_come_back_as_they_were(ledger: Ledger) -> None:
    """In the order of time; every field, empty ones and arrays too."""
    bare = {
        "answer": None,
        "request_id": None,
        "output": None,
        "choices": (),
        "is_correct": None,
        "served_by": None,
    }
    rows = [
        row(1, **bare, state=RowState.UNLABELLED),
        row(2, sketch=np.arange(3, dtype=np.float32), state=RowState.CLUSTERED, cluster_id="c-1"),
        row(3, state=RowState.ASSIGNED, expert_id="e-1", is_trained=True, is_correct=True),
    ]
    ledger.commit(Changes(rows={each.position: each for each in reversed(rows)}))
    assert_same_rows(list(reloaded(ledger).load().rows), rows)


def test_a_row_is_replaced_by_its_newest_state(ledger: Ledger) -> None:
    """Upserts go by position; the other rows stay."""
    ledger.commit(Changes(rows={each.position: each for each in (row(1), row(2))}))
    newer = row(1, state=RowState.ASSIGNED, expert_id="e-1")
    ledger.commit(Changes(rows={newer.position: newer}))
    assert_same_rows(list(reloaded(ledger).load().rows), [newer, row(2)])


def test_forgotten_rows_are_gone(ledger: Ledger) -> None:
    """Deleted after the upserts of the same commit; the others stay."""
    rows = [row(1), row(2), row(3)]
    ledger.commit(Changes(rows={each.position: each for each in rows}, forgotten=["requests:0:2"]))
    assert_same_rows(list(reloaded(ledger).load().rows), [row(1), row(3)])


def test_ended_clusters_are_gone(ledger: Ledger) -> None:
    """Deleted after the upserts of the same commit; the others stay, and so do rows."""
    ledger.commit(Changes(clusters={name: cluster(name) for name in ("c-1", "c-2")}))
    ledger.commit(Changes(clusters={"c-3": cluster("c-3")}, ended=["c-2", "c-3"]))
    assert [each.cluster_id for each in reloaded(ledger).load().clusters] == ["c-1"]


def test_rows_that_waited_too_long_for_an_answer_are_deleted(ledger: Ledger) -> None:
    """Rows without one from before a time; rows of other states stay."""
    rows = [row(1, state=RowState.UNLABELLED), row(2), row(3, state=RowState.UNLABELLED)]
    ledger.commit(Changes(rows={each.position: each for each in rows}))
    ledger.commit(Changes(unlabelled_before_ms={"default": row(3).time_ms, "acme": row(9).time_ms}))
    assert_same_rows(list(reloaded(ledger).load().rows), rows[1:])


def test_only_the_newest_rows_without_an_answer_are_loaded_and_all_are_found(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By position, and by request id and tenant; nobody else's."""
    monkeypatch.setattr("dylora_stream.store.database.MOST_UNLABELLED", 1)
    monkeypatch.setattr("dylora_stream.testing.learning.MOST_UNLABELLED", 1)
    rows = [row(1, state=RowState.UNLABELLED), row(2), row(3, state=RowState.UNLABELLED)]
    ledger.commit(Changes(rows={each.position: each for each in rows}))
    ledger = reloaded(ledger)
    assert_same_rows(list(ledger.load().rows), rows[1:])
    by_position = Feedback(position=Position("requests", 0, 1), id=None, output="x")
    by_id = Feedback(position=None, id="id-1", output="x", tenant="default")
    for late in (by_position, by_id):
        assert_same_rows(ledger.find([late]), rows[:1])
    nobodys = [replace(by_id, tenant="acme"), replace(by_position, position=Position("requests", 0, 9))]
    assert ledger.find(nobodys) == ledger.find([]) == ledger.at([]) == []
    assert_same_rows(ledger.find([*nobodys, by_id]), rows[:1])
    assert_same_rows(ledger.at([rows[0].position, "requests:0:9"]), rows[:1])


def test_of_rows_with_one_id_the_newest_without_an_answer_is_found(ledger: Ledger) -> None:
    """Senders use ids again."""
    rows = [
        row(n, state=RowState.UNLABELLED, request_id="7", output=out)
        for n, out in ((1, None), (2, None), (3, "x"))
    ]
    ledger.commit(Changes(rows={each.position: each for each in rows}))
    late = Feedback(position=None, id="7", output="x", tenant="default")
    assert_same_rows(ledger.find([late, late]), rows[1:2])


def test_of_rows_that_were_trained_on_a_start_loads_the_newest(ledger: Ledger) -> None:
    """Of a served expert's texts the newest rows, of others none, and a running job's; the others can be listed."""
    own = {"state": RowState.ASSIGNED, "expert_id": "e-1", "is_trained": True}
    trained = [row(n, **own) for n in range(6)]
    again = [row(6, **own, input=trained[1].input), row(7, **(own | {"is_trained": False}))]
    others = [row(8, **(own | {"expert_id": "e-gone"})), row(9, **(own | {"state": RowState.SETTLED}))]
    known = [
        row(n, **(own | {"is_trained": False}), input=trained[n % 5].input, output=None)
        for n in range(10, 15)
    ]
    rows = [*trained, *again, *others, *known]
    ledger.commit(
        Changes(
            rows={each.position: each for each in rows},
            jobs={"j-1": job("j-1", 0), "j-2": job("j-2", 1, 2, 3, state=JobState.DONE)},
            versions=[version(1, "j-2")],
            registry=Registry(experts=(version(1, "j-2"),)),
        )
    )
    ledger = reloaded(ledger)
    assert_same_rows(list(ledger.load(expert_texts=3).rows), [rows[0], rows[5], *again, *known])
    assert_same_rows(list(ledger.load().rows), rows)
    assert_same_rows(ledger.training_rows("e-1", 1), trained[1:4])


def test_clusters_jobs_and_registry_come_back_equal(ledger: Ledger) -> None:
    """Of jobs the running ones only."""
    fields_of_one = {"cluster_id": "c-1", "skill_id": "s-1", "tenant": "default", "created_ms": 3}
    cluster = ClusterRecord(state=ClusterState.TRAINING, rows_wanted=80, rejections=1, **fields_of_one)  # type: ignore[arg-type]
    registry = Registry(
        experts=(version(1, "j"),),
        router=StoredFolder(path="cd/1", sha256="f"),
        feature_space="space",
        backbone="digest",
    )
    running, done = job("j-1", 1, 2), job("j-2", 3, state=JobState.DONE)
    changes = Changes(clusters={"c-1": cluster}, jobs={"j-1": running, "j-2": done}, registry=registry)
    ledger.commit(changes)
    state = reloaded(ledger).load()
    assert (state.clusters, state.jobs, state.registry) == ((cluster,), (running,), registry)


def test_an_empty_ledger_has_an_empty_state(ledger: Ledger) -> None:
    """Nothing served, nothing to take up again."""
    state = reloaded(ledger).load()
    assert (state.rows, state.clusters, state.jobs, state.registry) == ((), (), (), Registry())
    assert ledger_positions(ledger) == {}


def test_late_answers_are_kept_until_their_row_has_come(ledger: Ledger) -> None:
    """Oldest first; the last one for a record counts; those that were let go of are gone."""
    at = Feedback(position=Position("requests", 0, 7), id=None, output="é", tenant="acme", timestamp_ms=9)
    named = Feedback(position=None, id="at 7", output="", timestamp_ms=5)
    both = Feedback(position=Position("requests", 1, 7), id="id", output="x", timestamp_ms=7)
    ledger.commit(Changes(answers={late.target: late for late in (at, named, both)}))
    ledger = reloaded(ledger)
    assert ledger.load().answers == (named, both, at)
    newer = replace(both, output="y")
    ledger.commit(Changes(answers={at.target: None, newer.target: newer, "default id unheard of": None}))
    assert reloaded(ledger).load().answers == (named, newer)


def test_the_era_is_kept_with_the_positions_that_begin_it(ledger: Ledger) -> None:
    """The first is 0; changes that say nothing of it leave it as it is."""
    assert ledger.load().era == 0
    ledger.commit(Changes(positions={("samples", 0): 0}, era=1))
    ledger.commit(Changes(positions={("samples", 0): 5}))
    ledger = reloaded(ledger)
    assert (ledger.load().era, ledger.positions()) == (1, {("samples", 0): 5})


def ledger_positions(ledger: Ledger) -> dict[tuple[str, int], int]:
    """After a restart."""
    return reloaded(ledger).positions()


def test_positions_are_kept_by_partition(ledger: Ledger) -> None:
    """The newest offset of each, with the time of the record before it, if it is given; others stay as they are."""
    before = {("samples", 0): 50, ("samples", 1): 20}
    ledger.commit(Changes(positions={("samples", 0): 5, ("samples", 1): 2}, stamps=before))
    ledger.commit(Changes(positions={("samples", 0): 9}))
    assert ledger.stamps() == {("samples", 1): 20}
    assert ledger_positions(ledger) == {("samples", 0): 9, ("samples", 1): 2}


def test_a_commit_is_all_or_nothing(ledger: Ledger) -> None:
    """Changes of which one part cannot be written leave no other part behind."""
    broken = Changes(
        rows={"requests:0:1": row(1)},
        jobs={"j": job("j", 1)},
        versions=["no version"],  # type: ignore[list-item]
        messages=messages(b"1"),
        positions={("samples", 0): 5},
        answers={"t id x": Feedback(position=None, id="x", output="y", tenant="t")},
    )
    with pytest.raises((AttributeError, TypeError)):
        ledger.commit(broken)
    ledger = reloaded(ledger)
    assert (ledger.load().rows, ledger.load().jobs, ledger.positions(), ledger.outbox()) == ((), (), {}, [])
    assert ledger.load().answers == ()
    ledger.commit(Changes(rows={"requests:0:2": row(2)}))
    assert len(ledger.load().rows) == 1


def test_the_outbox_keeps_order_and_bytes(ledger: Ledger) -> None:
    """Over several commits, with tombstones and headers; each message has a mark of its own."""
    first = messages(b"1", b"2")
    tombstone = OutboundMessage(
        topic=Topic.EXPERTS, key=None, value=None, headers=(("h", b"\xff"), ("h", b""))
    )
    ledger.commit(Changes(messages=first))
    ledger.commit(Changes(messages=[tombstone, CODEC.encode_registry(Registry())]))
    entries = reloaded(ledger).outbox()
    assert [message for _, message in entries] == [*first, tombstone, CODEC.encode_registry(Registry())]
    assert len({mark for mark, _ in entries}) == len(entries)


def test_published_messages_are_forgotten_and_their_marks_never_used_again(ledger: Ledger) -> None:
    """A mark that Kafka already holds must not come back, or its message would be taken for published."""
    ledger.commit(Changes(messages=messages(b"1", b"2", b"3")))
    second = ledger.outbox()[1][0]
    ledger.published(second)
    assert [message.value for _, message in ledger.outbox()] == [b"3"]
    last = ledger.outbox()[0][0]
    ledger.published(last)
    ledger = reloaded(ledger)
    ledger.commit(Changes(messages=messages(b"4")))
    for mark in (second, last):
        ledger.published(mark)
    assert [message.value for _, message in ledger.outbox()] == [b"4"]


def test_a_mark_of_another_ledger_says_nothing(ledger: Ledger, tmp_path: Path) -> None:
    """Nor does the sequence number that an earlier version noted in Kafka, where the file it came from is gone."""
    other = DuckLedger(tmp_path / "other.duckdb")
    for each in (ledger, other):
        each.commit(Changes(messages=messages(b"1", b"2")))
    for mark in (other.outbox()[-1][0], "1", "99", ""):
        ledger.published(mark)
    assert [message.value for _, message in ledger.outbox()] == [b"1", b"2"]
    other.close()


def test_training_rows_are_listed_in_the_order_of_training(ledger: Ledger) -> None:
    """Each version its own, also after the next one went live; an unknown version has none."""
    ledger.commit(Changes(rows={each.position: each for each in map(row, range(6))}))
    first, second = job("j-1", 4, 0, 2, state=JobState.DONE), job("j-2", 5, 4, 3, 1, state=JobState.DONE)
    ledger.commit(
        Changes(jobs={"j-1": first, "j-2": second}, versions=[version(1, "j-1"), version(2, "j-2")])
    )
    ledger = reloaded(ledger)
    assert_same_rows(ledger.training_rows("e-1", 1), [row(4), row(0), row(2)])
    assert_same_rows(ledger.training_rows("e-1", 2), [row(5), row(4), row(3), row(1)])
    assert ledger.training_rows("e-1", 3) == ledger.training_rows("e-2", 1) == []


def test_the_summary_counts_rows_by_state_and_by_cluster(ledger: Ledger) -> None:
    """Distinct inputs apart from rows; a cluster without rows is listed too."""
    named = {"skill_id": "s", "tenant": "default", "state": ClusterState.OPEN, "rows_wanted": 80}
    clusters = [ClusterRecord(cluster_id=f"c-{n}", created_ms=n, **named) for n in (1, 2)]  # type: ignore[arg-type]
    inside = {"state": RowState.CLUSTERED, "cluster_id": "c-1"}
    rows = [row(0), row(1, **inside), row(2, **inside), row(3, **inside, input="input 1 é")]
    ledger.commit(
        Changes(
            rows={each.position: each for each in rows},
            clusters={each.cluster_id: each for each in clusters},
        )
    )
    summary = ledger.summary()
    assert dict(summary.rows) == {"clustered": 3, "waiting": 1}
    counted = [(c["cluster_id"], c["state"], c["row_count"], c["distinct_inputs"]) for c in summary.clusters]
    assert counted == [("c-1", "open", 3, 2), ("c-2", "open", 0, 0)]
    assert set(summary.clusters[0]) >= {field.name for field in fields(ClusterRecord)}


# ---- the file ----


def test_a_second_process_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    """DuckDB lets one process have the file; ours says which file and what to change."""
    path = tmp_path / "learn.duckdb"
    with writer(path) as process:
        with pytest.raises(DatabaseBusy, match=r"stop that one, or set another store\.folder"):
            DuckLedger(path)
        process.kill()
    DuckLedger(path).close()


class FullDisk:
    """A connection whose commits find no room, as DuckDB says it: rolled back by then."""

    def __init__(self, db: duckdb.DuckDBPyConnection) -> None:
        self._db = db

    def execute(self, statement: str, *values: object) -> object:
        """As the connection does."""
        if statement == "COMMIT":
            self._db.execute("ROLLBACK")
            raise duckdb.TransactionException(
                'TransactionContext Error: Failed to commit: Could not write file "learn.duckdb.wal": No space left on '
                "device"
            )
        return self._db.execute(statement, *values)


def test_a_disk_that_is_full_at_the_commit_is_named(tmp_path: Path) -> None:
    """And not the rollback that there was nothing left to do for."""
    ledger = DuckLedger(tmp_path / "learn.duckdb")
    ledger._db = FullDisk(ledger._db)
    with pytest.raises(DiskFull, match="free some space"):
        ledger.commit(Changes(positions={("samples", 0): 7}))


def test_a_garbage_file_is_reported_and_never_deleted(tmp_path: Path) -> None:
    """The message says to move it aside, and its bytes stay as they are."""
    path = tmp_path / "learn.duckdb"
    garbage = b"\x00\x07garbage\xff" * 2000
    path.write_bytes(garbage)
    with pytest.raises(DatabaseBroken, match="aside"):
        DuckLedger(path)
    assert path.read_bytes() == garbage


def test_a_damaged_write_ahead_log_is_reported_and_never_deleted(tmp_path: Path) -> None:
    """A byte flipped in its middle: what was committed cannot be replayed, and nobody pretends that it was."""
    path = tmp_path / "learn.duckdb"
    with writer(path) as process:
        process.kill()
    log = tmp_path / "learn.duckdb.wal"
    damaged = bytearray(log.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    log.write_bytes(damaged)
    with pytest.raises(DatabaseBroken, match="aside"):
        DuckLedger(path)
    assert log.read_bytes() == damaged


def test_another_schema_version_is_reported(tmp_path: Path) -> None:
    """A file of a later program is not written to."""
    path = tmp_path / "learn.duckdb"
    ledger = DuckLedger(path)
    ledger._db.execute("UPDATE schema_version SET version = 99")
    ledger.close()
    with pytest.raises(DatabaseBroken, match="schema 99"):
        DuckLedger(path)


def test_a_file_of_version_1_is_upgraded(tmp_path: Path) -> None:
    """With all that it holds, and once: also where the process dies right after it."""
    path = tmp_path / "learn.duckdb"
    with duckdb.connect(str(path)) as old:
        old.execute(Path(__file__).with_name("schema_1.sql").read_text())
        old.execute("INSERT INTO schema_version VALUES (1)")
        old.execute(
            "INSERT INTO rows VALUES ('t:0:1', 'id', 'default', 'text', NULL, ['a'], 'novel', 5, NULL, 'e-1', 1, "
            "'unlabelled', [0.5, 1.5], NULL, NULL, NULL, false)"
        )
        for value in (b"1", b"2", b"3"):
            old.execute(
                "INSERT INTO outbox (topic, key, value, headers) VALUES ('events', 'k', ?, '[]')", [value]
            )
    with writer(path) as process:
        process.kill()
    ledger = DuckLedger(path)
    assert [each.input for each in ledger.load().rows] == ["text"]
    ledger.published("2")  # what version 1 noted in Kafka
    assert [message.value for _, message in ledger.outbox()] == [b"3", b"v", b"v", b"v"]
    ledger.close()


@pytest.mark.parametrize("published", [0, 3])
def test_what_was_committed_survives_kill_9(tmp_path: Path, published: int) -> None:
    """Positions and outbox of an acknowledged commit are there; new messages come after them."""
    path = tmp_path / "learn.duckdb"
    with writer(path, published) as process:
        os.kill(process.pid, signal.SIGKILL)
    ledger = DuckLedger(path)
    assert ledger.positions() == {("samples", 0): 7}
    ledger.commit(Changes(messages=messages(b"next")))
    assert [message.value for _, message in ledger.outbox()] == [b"v", b"v", b"v", b"next"][published:]
    ledger.close()


class writer:  # noqa: N801 - reads as a block's opening
    """A process that has committed and holds the file open until it is killed."""

    def __init__(self, path: Path, published: int = 0) -> None:
        command = [sys.executable, "-c", WRITER, str(path), str(published)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "subprocess.Popen[bytes]":
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"committed\n"
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def test_more_rows_than_duckdb_may_take_at_once_are_loaded_and_committed(tmp_path: Path) -> None:
    """All rows that wait, of a wide backbone, are more than `store.memory_limit`: a start reads them, oldest first, and
    what moves all of them (an expert that claims them, a month without records) is one commit."""
    path = tmp_path / "learn.duckdb"
    DuckLedger(path).close()
    with duckdb.connect(str(path)) as db:  # 48 MB of features
        db.execute(
            "INSERT INTO rows BY NAME SELECT 'r:0:' || number AS position, 'default' AS tenant, 'text' AS input, "
            "'novel' AS reason, 12_000 - number AS time_ms, 0 AS served_version, 'waiting' AS state, "
            "false AS is_trained, range(1024)::FLOAT[] AS features FROM range(12_000) numbers(number)"
        )
    ledger = DuckLedger(path, DatabaseConfig(memory_limit="40MB"))
    rows = ledger.load(384).rows
    assert [row.time_ms for row in rows] == list(range(1, 12_001))
    ledger.commit(Changes(rows={each.position: replace(each, state=RowState.SETTLED) for each in rows}))
    assert ledger.summary().rows == {"settled": 12_000}
    ledger.close()


def test_ctrl_c_within_a_statement_is_ctrl_c(tmp_path: Path) -> None:
    """DuckDB turns it into an error of its own, which a command would show as a traceback."""

    def run_for_long() -> None:
        with duckdb.connect() as db, database_errors(tmp_path):
            db.execute("SELECT sum(random()) FROM range(5_000_000_000)")

    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_for_long()


@pytest.mark.parametrize("limit", ["512", "much", "5XB"])
def test_a_memory_limit_that_is_none_is_a_wrong_setting(limit: str, tmp_path: Path) -> None:
    """A restart would not mend it; DuckDB says what it wants."""
    with pytest.raises(SettingsError, match=f"store.memory_limit is '{limit}'"):
        DuckLedger(tmp_path / "learn.duckdb", DatabaseConfig(memory_limit=limit))
