"""Who this process is: an instance id under a lock in the data folder.

Transactional ids and group membership need a name that survives a restart and that no second process shares. Each role
takes the first number whose lock file is free; the lock is the kernel's, so a killed process gives it back at once. The
file's text is the process id, for whoever wants to signal it.
"""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dylora_stream.core.errors import StoreError

__all__ = ["Identity", "claim_identity"]

MOST_INSTANCES = 64  # of one role in one data folder


@dataclass(frozen=True, slots=True)
class Identity:
    """A claimed name; keep the object for the life of the process."""

    name: str  # `{host part}-{role}-{number}`
    lock: TextIO


def claim_identity(folder: Path, role: str, application: str) -> Identity:
    """The lowest free instance of this role in this data folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MOST_INSTANCES):
        lock = (folder / f"{role}-{number}.pid").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return Identity(f"{application}-{role}-{number}", lock)
    raise StoreError(
        f"{MOST_INSTANCES} {role} processes already use {folder}; give this one another store.folder"
    )
