"""The doctor: each check says what it found, or what to do."""

from pathlib import Path

import pytest

from dylora_stream.core.errors import BrokerUnreachable, DyloraError
from dylora_stream.ops.doctor import examine, machine_probes, probe_cores, probe_folder
from dylora_stream.ops.http import HttpConfig


def surprised() -> str:
    """What nobody expected."""
    raise OSError("too many open files")


def unreachable() -> str:
    """A broker that does not answer."""
    raise BrokerUnreachable("no broker answers; start one")


def test_one_failing_check_does_not_hide_the_others() -> None:
    """All probes run; a failed one carries its advice."""
    checks = examine({"broker": unreachable, "topics": surprised, "model": lambda: "smollm2"})
    assert [(check.name, check.is_ok, check.detail) for check in checks] == [
        ("broker", False, "no broker answers; start one"),
        ("topics", False, "unexpected OSError: too many open files"),
        ("model", True, "smollm2"),
    ]


def test_this_machine_passes(tmp_path: Path) -> None:
    """What runs these tests can run the daemon."""
    checks = examine(machine_probes(tmp_path / "data", HttpConfig(port=0), 0))
    assert [check.detail for check in checks if not check.is_ok] == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where the data folder should be."""
    (tmp_path / "data").write_text("")
    with pytest.raises(DyloraError, match="set store.folder"):
        probe_folder(tmp_path / "data")


def test_more_threads_than_cores_are_advised_against() -> None:
    """Oversubscribed torch is slower, not faster."""
    with pytest.raises(DyloraError, match="model.threads is 100000"):
        probe_cores(100_000)
