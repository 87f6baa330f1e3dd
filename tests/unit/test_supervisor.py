"""The supervisor as a real process, with tiny programs as roles; all of them write to one pipe.

Reading that pipe to its end waits until nobody is left who could write; one `os.write` a line keeps lines whole.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SUPERVISOR = """
import sys
from dylora_stream.ops.supervisor import Role, Supervisor
deadline_s, *programs = sys.argv[1:]
roles = [
    Role(name=f"role-{number}", command=(sys.executable, "-c", program)) for number, program in enumerate(programs)
]
sys.exit(Supervisor(roles, float(deadline_s)).run())
"""

# Drains on SIGTERM, ends when the supervisor's pipe closes.
STEADY = """
import os, signal, sys
def drain(*_):
    os.write(1, b"steady drained\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
os.write(1, f"steady started {os.getsid(0) == os.getpid()} {os.getpid()}\\n".encode())
sys.stdin.read()
os.write(1, b"steady orphaned\\n")
"""

STUBBORN = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, b"stubborn started\\n")
sys.stdin.read()
"""

# Falls twice, then stays; the file counts.
SHAKY = """
import os, pathlib, sys, time
path = pathlib.Path({path!r})
path.write_text((path.read_text() if path.exists() else "") + "x")
os.write(1, f"shaky started {{time.monotonic()}}\\n".encode())
if len(path.read_text()) < 3:
    sys.exit(1)
sys.stdin.read()
"""

HOPELESS = "import sys; sys.exit({code})"


@contextmanager
def supervising(*programs: str, deadline_s: float = 20.0) -> "Iterator[subprocess.Popen[str]]":
    """A supervisor of these programs; whatever is left of it at the end is killed."""
    command = [sys.executable, "-c", SUPERVISOR, str(deadline_s), *programs]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: "subprocess.Popen[str]", word: str | tuple[str, ...], count: int) -> list[str]:
    """The next lines that begin so, the supervisor's own log and other roles passed over."""
    assert process.stdout is not None
    found: list[str] = []
    while len(found) < count:
        line = process.stdout.readline()
        assert line, f"everybody ended after {found}"
        if line.startswith(word):
            found.append(line.strip())
    return found


def rest(process: "subprocess.Popen[str]") -> str:
    """All that is written until the last process has ended."""
    assert process.stdout is not None
    return process.stdout.read()


def test_a_role_has_its_own_session() -> None:
    """Ctrl-C reaches it once, through the supervisor."""
    with supervising(STEADY) as process:
        assert lines(process, "steady", 1)[0].startswith("steady started True")


def test_a_fallen_role_is_restarted_with_back_off_while_the_other_goes_on(tmp_path: Path) -> None:
    """Half a second after the first fall, a whole one after the second; the other role starts once."""
    with supervising(SHAKY.format(path=str(tmp_path / "starts")), STEADY) as process:
        times = [float(line.split()[2]) for line in lines(process, "shaky", 3)]
        process.send_signal(signal.SIGTERM)
        after = rest(process)
    assert times[1] - times[0] >= 0.5
    assert times[2] - times[1] >= 1.0
    assert "steady drained" in after
    assert "steady started" not in after


def test_a_role_that_was_drained_by_itself_is_started_again() -> None:
    """Its end is well, but nobody told the daemon to end."""
    with supervising(STEADY, STEADY.replace("steady", "other")) as process:
        started = lines(process, ("steady started", "other started"), 2)
        (other,) = [line for line in started if line.startswith("other")]
        os.kill(int(other.split()[-1]), signal.SIGTERM)
        lines(process, "other started", 1)
        process.send_signal(signal.SIGTERM)
        assert "steady drained" in rest(process)


@pytest.mark.parametrize("code", [2, 5], ids=["wrong-setting", "no-model"])
def test_what_a_restart_would_not_mend_ends_all_with_its_exit_code(code: int) -> None:
    """The other role is ended too, and the supervisor says what the role said."""
    with supervising(STEADY, HOPELESS.format(code=code)) as process:
        rest(process)
        assert process.wait() == code


def test_sigterm_drains_every_role() -> None:
    """Each is told once and waited for; the exit code is 0."""
    with supervising(STEADY, STEADY) as process:
        lines(process, "steady started", 2)
        process.send_signal(signal.SIGTERM)
        assert rest(process).count("steady drained") == 2
        assert process.wait() == 0


def test_a_role_that_does_not_drain_is_killed_at_the_deadline() -> None:
    """Nothing outlives the supervisor's end."""
    with supervising(STUBBORN, deadline_s=0.2) as process:
        lines(process, "stubborn", 1)
        process.send_signal(signal.SIGTERM)
        rest(process)
        assert process.wait() == 0


def test_a_second_signal_skips_the_waiting() -> None:
    """Ctrl-C twice ends at once what would have had minutes."""
    with supervising(STUBBORN, STEADY, deadline_s=600.0) as process:
        lines(process, ("stubborn started", "steady started"), 2)
        process.send_signal(signal.SIGTERM)
        lines(process, "steady drained", 1)
        process.send_signal(signal.SIGTERM)
        rest(process)
        assert process.wait() == 0


def test_roles_end_when_the_supervisor_is_killed() -> None:
    """SIGKILL leaves no time for anything; the pipe closes, and the roles see it."""
    with supervising(STEADY, STEADY) as process:
        lines(process, "steady started", 2)
        process.kill()
        assert rest(process).count("steady orphaned") == 2
