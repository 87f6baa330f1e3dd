"""Job folders, and the child process that works through them.

A job is a folder: `job.json` (what to do), `rows.jsonl` (with what), and, once done, `result/`. Its name is the digest
of rows, recipe, seed, threads and backbone, so the same job asked for twice is the same folder, and a result that is
already there is taken as it is. A folder lives as long as its job runs: what came of it is in the ledger and the expert
store once its end is committed, and rows of the stream are not left lying in files.

The child is exec'd, never forked, into a session of its own, niced, with `learn.threads` threads; it stays between jobs
(importing torch takes seconds), and ends when its standard input closes, so it cannot outlive this process.
"""

import contextlib
import errno
import hashlib
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dylora_stream.core.clustering import Reference
from dylora_stream.core.durable import put_in_place
from dylora_stream.core.errors import DiskFull, StoreError, TrainingFailed
from dylora_stream.core.ledger import LedgerRow
from dylora_stream.core.ports import JobUpdate

__all__ = [
    "ChildProcess", "job_digest", "read_reference", "read_report", "read_sketches", "remove_job", "remove_jobs_but",
    "row_document", "write_job",
]  # fmt: skip

log = structlog.get_logger(__name__)


def job_digest(description: Mapping[str, Any], rows: Sequence[LedgerRow]) -> str:
    """16 hex digits over what the job's result depends on."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(json.dumps([row.position, row.input, row.output, row.choices]).encode())
    return digest.hexdigest()[:16]


def write_job(
    root: Path, job_id: str, description: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Path:
    """The job's folder, written aside and put in place; one that is there already is kept with its result.

    Raises DiskFull, and StoreError where it cannot be written.
    """
    folder = root / job_id
    if (folder / "job.json").exists():
        return folder
    aside = root / f".{job_id}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / "job.json").write_text(json.dumps({"id": job_id, **description}, indent=1, default=str))
        (aside / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        put_in_place(aside, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"no room left in {root}; free some space") from error
        raise StoreError(f"{root} cannot be written ({error.strerror or error})") from error
    return folder


def remove_job(root: Path, job_id: str) -> None:
    """The folder of a job whose end is committed goes, with all that is in it."""
    shutil.rmtree(root / job_id, ignore_errors=True)


def remove_jobs_but(root: Path, running: Collection[str]) -> None:
    """Folders of all other jobs go: of one that ended just before this process did, or was never begun."""
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name not in running:
            remove_job(root, folder.name)


def row_document(row: LedgerRow, count: int = 1) -> dict[str, Any]:
    """A row as a job has it; `count` records came with its text."""
    return {
        "position": row.position,
        "input": row.input,
        "output": row.output,
        "choices": row.choices,
        "is_new": not row.is_trained,
        "count": count,
    }


def read_report(result: Path) -> dict[str, Any]:
    """The `report.json` of a training's result folder, which holds a decision. Raises TrainingFailed."""
    with _result_errors():
        report: dict[str, Any] = json.loads((result / "report.json").read_text())
        if report["decision"] == "promoted" and not (result / "expert").is_dir():
            raise ValueError("there is no expert in it")
        return report


def read_sketches(result: Path, rows: int) -> np.ndarray:
    """(rows, A) float32 answer rows of a sketch job's result folder. Raises TrainingFailed."""
    with _result_errors():
        sketches = load_file(result / "sketches.safetensors")["sketches"]
        if len(sketches) != rows:
            raise ValueError(f"{len(sketches)} sketches of {rows} rows")
        return sketches


def read_reference(path: Path) -> Reference:
    """What similarities are measured against. Raises TrainingFailed."""
    with _result_errors():
        return Reference(**load_file(path))


@contextlib.contextmanager
def _result_errors() -> Iterator[None]:
    """Whatever a damaged file makes its reader say."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingFailed(f"its result cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildConfig:
    """How the child is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    niceness: int = 10


class ChildProcess:
    """`core.ports.Child` as a resident subprocess; started at the first job, and again after it died."""

    def __init__(self, config: ChildConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        self._job: str | None = None

    def submit(self, folder: Path) -> None:
        """See the port."""
        if self._job is not None:
            raise RuntimeError(f"job {self._job} is still running")
        process = self._alive() or self._start()
        self._job = folder.name
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # its death is reported by `updates`
                process.stdin.write(f"{folder}\n")
                process.stdin.flush()

    def updates(self) -> list[JobUpdate]:
        """See the port."""
        found = []
        while not self._lines.empty():
            pid, line = self._lines.get()
            if self._process is None or pid != self._process.pid:
                continue
            if line is None:
                code = self._release(self._process)
                if self._job is not None:
                    found.append(JobUpdate(job=self._job, error=f"the child process ended with code {code}"))
                self._process = self._job = None
            elif (update := _parse(line)) is not None and update.job == self._job:
                found.append(update)
                if update.progress is None:
                    self._job = None
        return found

    @property
    def is_idle(self) -> bool:
        """See the port."""
        return self._job is None

    def close(self) -> None:
        """See the port."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._release(process)

    def _release(self, process: subprocess.Popen[str]) -> int:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # a line that it never read
                process.stdin.close()
        return process.wait()

    def _alive(self) -> subprocess.Popen[str] | None:
        return self._process if self._process is not None and self._process.poll() is None else None

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._config.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **self._config.environment},
        )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, self._config.niceness)
        self._process = process
        threading.Thread(target=self._read, args=(process,), daemon=True, name="child-output").start()
        log.info("child_started", pid=process.pid)
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        if process.stdout is not None:
            with process.stdout:
                for line in process.stdout:
                    self._lines.put((process.pid, line))
        self._lines.put((process.pid, None))


def _parse(line: str) -> JobUpdate | None:
    """One line of the child; None for anything a library printed in between."""
    try:
        said = json.loads(line)
        result = said.get("result")
        return JobUpdate(
            job=said["job"],
            progress=said.get("progress"),
            result=None if result is None else Path(result),
            error=said.get("error"),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
