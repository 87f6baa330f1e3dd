"""How a role ends, as a real process: by itself when it is told to, and at its deadline when it does not."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dylora_stream.bootstrap import roles
from dylora_stream.ops.http import Health, HttpRoutes
from dylora_stream.settings import load_settings

PROGRAM = """
import sys, time
from dylora_stream.bootstrap.roles import _until_signalled

class Service:
    is_draining = False

    def run(self):
        print("running", flush=True)
        while not ({is_obedient} and self.is_draining):
            time.sleep(0.01)

    def drain(self):
        self.is_draining = True

_until_signalled(Service(), {deadline_s}, is_supervised={is_supervised})
"""


@contextmanager
def role(
    *, is_obedient: bool, deadline_s: float, is_supervised: bool = False
) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs a service as a role does."""
    program = PROGRAM.format(is_obedient=is_obedient, deadline_s=deadline_s, is_supervised=is_supervised)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("is_supervised", [False, True])
@pytest.mark.parametrize(("is_obedient", "deadline_s", "code"), [(True, 60.0, 0), (False, 0.1, 143)])
def test_a_drain_ends_by_itself_or_at_its_deadline(
    is_obedient: bool, deadline_s: float, code: int, is_supervised: bool
) -> None:
    """Whether a signal asked for it, or a supervisor's pipe that closed."""
    with role(is_obedient=is_obedient, deadline_s=deadline_s, is_supervised=is_supervised) as process:
        if is_supervised:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == code


def test_a_supervised_role_that_is_told_to_end_ends_well() -> None:
    """While the supervisor's pipe is open, whose reader must not make Python's own end a crash."""
    with role(is_obedient=True, deadline_s=60.0, is_supervised=True) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_supervised_role_drains_though_it_is_told_twice() -> None:
    """By a service manager that signals every process of the service, and by its supervisor."""
    with role(is_obedient=False, deadline_s=1.0, is_supervised=True) as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143


def test_the_training_child_is_ended_by_learn_and_by_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service manager that signals every process would have its job fail, which is to be taken up again."""
    from dylora_stream.model import jobs

    dispositions: list[object] = []
    monkeypatch.setattr(jobs, "serve_jobs", lambda *_: dispositions.append(signal.getsignal(signal.SIGTERM)))
    monkeypatch.setattr(roles, "configure_logs", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        roles.child(load_settings())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert dispositions == [signal.SIG_IGN]


def test_the_training_child_ends_with_learn_in_the_middle_of_a_job() -> None:
    """Learn may be killed: its pipe closes, and nobody is to hear of what the child is at."""
    script = (
        "import sys, time\nfrom dylora_stream.bootstrap.roles import _lines_while_open\n"
        "for line in _lines_while_open():\n    print(line, end='', flush=True)\n    time.sleep(600)\n"
    )
    command = (sys.executable, "-c", script)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        print("jobs/first", file=process.stdin, flush=True)
        assert process.stdout.readline() == "jobs/first\n"
        process.stdin.close()
        process.stdin = None
        assert process.wait(20) == 0


def test_a_second_signal_ends_at_once() -> None:
    """Without waiting for the deadline."""
    with role(is_obedient=False, deadline_s=60.0) as process:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_role_that_ends_takes_its_address_back(tmp_path: Path) -> None:
    """Another data folder's daemon may have the port next, and would be asked in its place."""
    settings = load_settings(flags=[f"store.folder={tmp_path}", "http.port=0"])
    routes = HttpRoutes(health=lambda: Health(is_alive=True, is_ready=True), metrics=lambda: b"")
    told = tmp_path / "serve.http"
    with ExitStack() as first:
        roles._open_port(settings, routes, first, "serve")
        with ExitStack() as second:
            roles._open_port(settings, routes, second, "serve")
            newest = told.read_text()
            first.close()
            assert told.read_text() == newest
        assert not told.exists()
