"""The resident child process: small real programs stand in for the one that trains."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dylora_stream.core.ports import JobUpdate
from dylora_stream.learn.jobs import ChildConfig, ChildProcess

# What it does is the job folder's name; it says its pid with every result.
CHILD = """
import json, os, sys
def say(**words):
    print(json.dumps(words), flush=True)
for line in sys.stdin:
    folder = line.strip()
    name = os.path.basename(folder)
    if name.startswith("die"):
        os._exit(7)
    if name.startswith("fail"):
        say(job=name, error="no gain")
        continue
    print("a library prints a line")
    print('{"half": ')
    print('[1, 2]')
    say(job="another", result="/elsewhere")
    say(job=name, progress={"step": 1, "steps": 2, "pid": os.getpid()})
    if name.startswith("hang"):
        sys.stdin.readline()
        continue
    say(job=name, result=folder + "/result")
"""

# Starts the child above, prints its pid, and is killed: nothing of it may be left.
PARENT = """
import sys
from pathlib import Path
from dylora_stream.learn.jobs import ChildConfig, ChildProcess
child = ChildProcess(ChildConfig(command=(sys.executable, "-c", sys.argv[1]), environment={}))
child.submit(Path("/jobs/hang"))
print(child._process.pid, file=sys.stderr, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    """Not yet started; closed at the end."""
    child = ChildProcess(ChildConfig(command=(sys.executable, "-c", CHILD), environment={"PYTHONUTF8": "1"}))
    yield child
    child.close()


def heard(child: ChildProcess, is_enough: Callable[[list[JobUpdate]], bool]) -> list[JobUpdate]:
    """Updates until there are enough of them; pytest's time limit is the only other end."""
    found: list[JobUpdate] = []
    while not is_enough(found):
        found += child.updates()
        threading.Event().wait(0.01)
    return found


def has_ended(updates: list[JobUpdate]) -> bool:
    """Whether the job has its result or its error."""
    return bool(updates) and updates[-1].progress is None


def run(child: ChildProcess, name: str) -> list[JobUpdate]:
    """A job from beginning to end."""
    child.submit(Path("/jobs") / name)
    return heard(child, has_ended)


def test_a_job_tells_its_progress_and_then_its_result(child: ChildProcess) -> None:
    """Lines of libraries, broken JSON and other jobs' lines in between are passed over."""
    updates = run(child, "good")
    assert [update.job for update in updates] == ["good", "good"]
    assert updates[0].progress is not None
    assert updates[0].progress["steps"] == 2
    assert updates[1] == JobUpdate(job="good", result=Path("/jobs/good/result"))
    assert child.is_idle


def test_the_child_stays_between_jobs(child: ChildProcess) -> None:
    """Starting it takes seconds, so the second job meets the same process; a failed job does not end it."""
    first, failed, second = run(child, "good-1"), run(child, "fail"), run(child, "good-2")
    assert failed == [JobUpdate(job="fail", error="no gain")]
    assert first[0].progress is not None
    assert second[0].progress is not None
    assert first[0].progress["pid"] == second[0].progress["pid"]


def test_a_second_job_is_refused_while_one_runs(child: ChildProcess) -> None:
    """One at a time."""
    child.submit(Path("/jobs/hang"))
    assert not child.is_idle
    with pytest.raises(RuntimeError, match="hang is still running"):
        child.submit(Path("/jobs/good"))


def test_a_death_is_the_jobs_error_and_the_next_job_starts_anew(child: ChildProcess) -> None:
    """The error says how it ended; the job after it runs in a new process."""
    updates = run(child, "die")
    assert updates == [JobUpdate(job="die", error="the child process ended with code 7")]
    assert child.is_idle
    assert run(child, "good")[-1].result == Path("/jobs/good/result")


def test_a_death_between_jobs_is_noticed_by_the_next_one(child: ChildProcess) -> None:
    """The job that comes after an idle child was killed is done by a new one, not reported as dead."""
    run(child, "good-1")
    process = child._process
    assert process is not None
    process.kill()
    heard(child, lambda _: child._process is None)
    assert run(child, "good-2")[-1].result == Path("/jobs/good-2/result")


def test_closing_kills_what_runs(child: ChildProcess) -> None:
    """At once, in the middle of a job; twice is fine, and so is closing what never started."""
    child.submit(Path("/jobs/hang"))
    heard(child, bool)
    process = child._process
    assert process is not None
    child.close()
    assert process.returncode == -9
    child.close()
    ChildProcess(ChildConfig(command=("true",), environment={})).close()


def test_the_child_ends_with_its_parent() -> None:
    """Its standard input closes when the parent is killed with SIGKILL, and that ends it: nobody writes any more."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert parent.stderr is not None
    assert int(parent.stderr.readline()) != parent.pid
    parent.kill()
    parent.communicate()  # to the end: the child holds the same pipe
