"""What a process was doing when it ended, in a file of the data folder (`core.ports.CrashJournal`).

The file is renamed into place but not forced to the disk: it is to outlive the process, not the machine, and is
written before and after every batch (half a millisecond on a busy machine).
"""

from pathlib import Path

import structlog

__all__ = ["FileJournal"]

log = structlog.get_logger(__name__)


class FileJournal:
    """One file, of one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_suffix(path.suffix + ".new")
        self._is_failing = False

    def read(self) -> str:
        """See the port."""
        try:
            return self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def write(self, text: str) -> None:
        """See the port; the first failure in a row is logged."""
        try:
            self._aside.write_text(text, encoding="utf-8")
            self._aside.replace(self._path)
        except OSError as error:
            if not self._is_failing:
                log.warning("journal_not_written", reason=str(error.strerror))
            self._is_failing = True
            return
        self._is_failing = False
