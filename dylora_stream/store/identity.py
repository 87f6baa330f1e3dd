"""Who this process is: an instance id under a lock in the data folder.

Transactional ids and group membership need a name that survives a restart and that no second process shares, on this
machine or another. Between data folders it is told apart by an id that is made once and kept in the folder; within one,
each role takes the first number whose lock file is free. The lock is the kernel's, so a killed process gives it back at
once. The file's text is the process id, for whoever wants to signal it.

A folder that is lost, or that had no id of its own before, gives its processes new names: a static member of an old
name that was killed keeps its partitions until its session times out, and a transaction that it left open lasts until
the broker's time-out. Nothing is lost or repeated by that; the stream waits for it once.
"""

import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dylora_stream.core.errors import StoreError

__all__ = ["Identity", "check_folder", "claim_folder", "claim_identity", "folder_id", "is_in_use"]

MOST_INSTANCES = 64  # of one role in one data folder
ID_BYTES = 4  # of chance: some thousand folders, and one in a thousand that two of them have one id


@dataclass(frozen=True, slots=True)
class Identity:
    """A claimed name; keep the object for the life of the process."""

    name: str  # `{instance}-{role}-{number}`
    lock: TextIO


def check_folder(folder: Path) -> None:
    """Make the data folder where it is missing. Raises StoreError where this process cannot write to it."""
    with _folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def folder_id(folder: Path) -> str:
    """The data folder's own id, 8 hexadecimal digits: made by whoever asks first, and the same ever after.

    Raises StoreError.
    """
    with _folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "instance").open("a+") as file:
            fcntl.flock(
                file, fcntl.LOCK_EX
            )  # until the file is closed: of two that start at once, one makes the id
            file.seek(0)
            found = file.read().strip()
            if not found:
                found = secrets.token_hex(ID_BYTES)
                file.write(found)
                file.flush()
                os.fsync(file.fileno())
            return found


def claim_folder(folder: Path) -> TextIO:
    """The one supervisor of a data folder; keep the file open for the life of the process. Raises StoreError."""
    with _folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.pid").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            found = lock.read().strip()
            lock.close()
            raise StoreError(
                f"another `dylora-stream run` (process {found}) works in {folder}: stop it, or give this one another "
                "store.folder; more serve workers on one folder are `run --role serve`"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock


def is_in_use(folder: Path) -> bool:
    """Whether a process holds one of the data folder's locks. Raises OSError."""
    for path in folder.glob("*.pid"):
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


@contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the data folder {folder} cannot be written ({error.strerror}): set store.folder to one that can, or give "
            "this user the right to"
        ) from error


def claim_identity(folder: Path, role: str, instance: str) -> Identity:
    """The lowest free number of this role in this data folder. Raises StoreError when none is free, and
    where the folder cannot be written.
    """
    with _folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(MOST_INSTANCES):
            lock = (folder / f"{role}-{number}.pid").open("a+")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return Identity(f"{instance}-{role}-{number}", lock)
    raise StoreError(
        f"{MOST_INSTANCES} {role} processes already use {folder}; give this one another store.folder"
    )
