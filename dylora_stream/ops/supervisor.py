"""One serve and one learn on one machine: started, watched, restarted, ended together.

Each role runs in a session of its own, so that Ctrl-C reaches it once, through here. It holds the read end of a pipe
and ends when that closes, so it cannot outlive this process, however this process ends. A role that falls, or that
somebody drained by itself, is started again with back-off while the other goes on; a wrong setting or a model that does
not load ends all, because a restart would not mend it.

The end: 1 SIGTERM to both · 2 wait for the deadline · 3 SIGKILL to what is left. A second signal skips the waiting.
"""

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import structlog

__all__ = ["Role", "Supervisor"]

log = structlog.get_logger(__name__)

HOPELESS = (2, 5)  # exit codes of what a restart would not mend: a wrong setting, a model that does not load
POLL_S = 0.1
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_S = 60.0  # a role that ran this long starts its back-off anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A name and the command that runs it."""

    name: str
    command: Sequence[str]


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    started_s: float
    falls: int = 0
    restart_at_s: float | None = None


class Supervisor:
    """Runs roles until a signal, or until one of them cannot go on."""

    def __init__(self, roles: Sequence[Role], drain_deadline_s: float) -> None:
        self._roles = {role.name: role for role in roles}
        self._deadline_s = drain_deadline_s
        self._running: dict[str, _Running] = {}
        self._signals = 0
        self._exit_code: int | None = None

    def run(self) -> int:
        """Blocks until the end; the exit code for this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for name in self._roles:
            self._running[name] = _Running(self._start(name), time.monotonic())
        while not self._signals and self._exit_code is None:
            for name, running in self._running.items():
                self._watch(name, running)
            time.sleep(POLL_S)
        self._end()
        return self._exit_code or 0

    def end(self) -> None:
        """Have `run` end; a second time, at once. Callable from another thread."""
        self._signals += 1

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.end()

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._roles[name].command,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        log.info("role_started", role=name, pid=process.pid)
        return process

    def _watch(self, name: str, running: _Running) -> None:
        now_s = time.monotonic()
        if running.restart_at_s is not None:
            if now_s >= running.restart_at_s:
                self._running[name] = _Running(self._start(name), now_s, running.falls)
            return
        code = running.process.poll()
        if code is None:
            return
        if code in HOPELESS:
            self._exit_code = code
            return
        running.falls = 1 if now_s - running.started_s > STEADY_S else running.falls + 1
        wait_s = min(FIRST_BACKOFF_S * 2 ** (running.falls - 1), LONGEST_BACKOFF_S)
        running.restart_at_s = now_s + wait_s
        log.warning("role_fell", role=name, code=code, restart_in_s=wait_s)

    def _end(self) -> None:
        left = [running.process for running in self._running.values() if running.process.poll() is None]
        for process in left:
            process.send_signal(signal.SIGTERM)
        end_s = time.monotonic() + self._deadline_s
        while any(process.poll() is None for process in left):
            if self._signals > 1 or time.monotonic() > end_s:
                log.warning("role_killed", reason="it did not end in time")
                for process in left:
                    process.kill()
            time.sleep(POLL_S)
