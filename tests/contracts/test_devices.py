"""The model room runs on a GPU unchanged: shown on a pretend one, because machines that test this have none."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def test_nothing_meets_a_tensor_of_another_device() -> None:
    """Reading, training, serving with every method, the router's lesson and a job: in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "on_pretend_gpu.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
