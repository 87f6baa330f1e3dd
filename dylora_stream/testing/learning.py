"""What learn stands on, in memory: ledger, expert store, child."""

import hashlib
import shutil
import tempfile
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from dylora_stream.core.errors import ExpertCorrupt
from dylora_stream.core.experts import Registry, StoredFolder
from dylora_stream.core.ledger import (
    MOST_UNLABELLED,
    Changes,
    ClusterRecord,
    JobRecord,
    JobState,
    LedgerRow,
    LedgerState,
    LedgerSummary,
    RowState,
)
from dylora_stream.core.messages import Feedback, OutboundMessage
from dylora_stream.core.ports import JobUpdate, Partition

__all__ = ["MemoryExpertStore", "MemoryLedger", "ScriptedChild"]


class MemoryLedger:
    """`core.ledger.Ledger` in a few dictionaries."""

    def __init__(self) -> None:
        self._rows: dict[str, LedgerRow] = {}
        self._clusters: dict[str, ClusterRecord] = {}
        self._jobs: dict[str, JobRecord] = {}
        self._versions: dict[tuple[str, int], str] = {}  # (expert, version) -> job
        self._registry = Registry()
        self._positions: dict[Partition, int] = {}
        self._stamps: dict[Partition, int] = {}
        self._answers: dict[str, Feedback] = {}
        self._era = 0
        self._outbox: list[tuple[str, OutboundMessage]] = []

    def load(self, expert_texts: int | None = None) -> LedgerState:
        """See the port."""
        rows = sorted(self._rows.values(), key=lambda row: (row.time_ms, row.position))
        unlabelled = [row.position for row in rows if row.state is RowState.UNLABELLED]
        left_out = set(unlabelled[: max(len(unlabelled) - MOST_UNLABELLED, 0)])
        if expert_texts is not None:
            left_out |= {row.position for row in rows if row.is_trained} - self._newest(rows, expert_texts)
        rows = [row for row in rows if row.position not in left_out]
        running = tuple(job for job in self._jobs.values() if job.state is JobState.RUNNING)
        clusters = sorted(
            self._clusters.values(), key=lambda cluster: (cluster.created_ms, cluster.cluster_id)
        )
        answers = sorted(self._answers.values(), key=lambda late: (late.timestamp_ms, late.target))
        return LedgerState(
            rows=tuple(rows),
            clusters=tuple(clusters),
            jobs=running,
            registry=self._registry,
            answers=tuple(answers),
            era=self._era,
        )

    def _newest(self, rows: Sequence[LedgerRow], texts: int) -> set[str]:
        """Positions of running jobs' rows, and of the newest answered rows of each served expert's newest texts."""
        running = (job for job in self._jobs.values() if job.state is JobState.RUNNING)
        found = {position for job in running for position in job.positions}
        for version in self._registry.experts:
            owned = [row for row in rows if row.expert_id == version.expert_id and row.output is not None]
            newest = {row.input: row for row in owned if row.state is RowState.ASSIGNED}
            ordered = sorted(newest.values(), key=lambda row: (row.time_ms, row.position), reverse=True)
            found |= {row.position for row in ordered[:texts]}
        return found

    def commit(self, changes: Changes) -> None:
        """See the port."""
        jobs = {(each.expert_id, each.version): str(each.trained_on.get("job")) for each in changes.versions}
        messages = [(uuid.uuid4().hex, message) for message in changes.messages]
        self._rows |= changes.rows
        before_ms = changes.unlabelled_before_ms
        self._rows = {
            position: row
            for position, row in self._rows.items()
            if position not in changes.forgotten
            and not (
                row.state is RowState.UNLABELLED and row.time_ms < before_ms.get(row.tenant, row.time_ms)
            )
        }
        clusters = self._clusters | changes.clusters
        self._clusters = {name: each for name, each in clusters.items() if name not in changes.ended}
        self._jobs |= changes.jobs
        self._versions |= jobs
        self._registry = changes.registry or self._registry
        self._positions |= changes.positions
        unmoved = {part: stamp for part, stamp in self._stamps.items() if part not in changes.positions}
        self._stamps = unmoved | changes.stamps
        self._era = self._era if changes.era is None else changes.era
        answers = self._answers | changes.answers
        self._answers = {target: late for target, late in answers.items() if late is not None}
        self._outbox += messages

    def positions(self) -> dict[Partition, int]:
        """See the port."""
        return dict(self._positions)

    def stamps(self) -> dict[Partition, int]:
        """See the port."""
        return dict(self._stamps)

    def outbox(self) -> list[tuple[str, OutboundMessage]]:
        """See the port."""
        return list(self._outbox)

    def published(self, mark: str) -> None:
        """See the port."""
        marks = [entry[0] for entry in self._outbox]
        self._outbox = self._outbox[marks.index(mark) + 1 :] if mark in marks else self._outbox

    def find(self, answers: Sequence[Feedback]) -> list[LedgerRow]:
        """See the port."""
        found = {row.position: row for row in self.at([str(late.position) for late in answers])}
        for late in answers:
            named = (late.id, late.tenant) if late.id is not None else None
            mine = [row for row in self._rows.values() if (row.request_id, row.tenant) == named]
            if mine:
                row = max(mine, key=lambda row: (row.output is None, row.time_ms))
                found[row.position] = row
        return list(found.values())

    def at(self, positions: Sequence[str]) -> list[LedgerRow]:
        """See the port."""
        return [self._rows[position] for position in positions if position in self._rows]

    def training_rows(self, expert_id: str, version: int) -> list[LedgerRow]:
        """See the port."""
        job = self._jobs.get(self._versions.get((expert_id, version), ""))
        return [] if job is None else [self._rows[position] for position in job.positions]

    def summary(self) -> LedgerSummary:
        """See the port."""
        states = Counter(str(row.state) for row in self._rows.values())
        described = []
        for cluster in self.load().clusters:
            mine = [row.input for row in self._rows.values() if row.cluster_id == cluster.cluster_id]
            described.append({**asdict(cluster), "row_count": len(mine), "distinct_inputs": len(set(mine))})
        return LedgerSummary(rows=dict(sorted(states.items())), clusters=tuple(described))

    def close(self) -> None:
        """See the port."""


class MemoryExpertStore:
    """`core.ports.ExpertStore` that copies folders to where they vanish with it, and checks nothing."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)

    def put(self, folder: Path) -> StoredFolder:
        """See the port."""
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
        stored = StoredFolder(path=digest.hexdigest(), sha256=digest.hexdigest())
        if not (self._root / stored.path).exists():
            shutil.copytree(folder, self._root / stored.path)
        return stored

    def open(self, stored: StoredFolder) -> Path:
        """See the port."""
        if stored.path not in {folder.name for folder in self._root.iterdir()}:
            raise ExpertCorrupt(f"{stored.path} was never put into this store")
        return self._root / stored.path


class ScriptedChild:
    """`core.ports.Child` that runs a function in this process, at once."""

    def __init__(self, run: Callable[[Path], Path]) -> None:
        self._run = run
        self._updates: list[JobUpdate] = []

    def submit(self, folder: Path) -> None:
        """See the port; an exception of the function is the job's error."""
        try:
            self._updates.append(JobUpdate(job=folder.name, result=self._run(folder)))
        except Exception as error:  # noqa: BLE001 - a child's failure is a message, whatever it was
            self._updates.append(JobUpdate(job=folder.name, error=str(error)))

    def updates(self) -> list[JobUpdate]:
        """See the port."""
        said, self._updates = self._updates, []
        return said

    @property
    def is_idle(self) -> bool:
        """See the port."""
        return not self._updates

    def close(self) -> None:
        """See the port."""
