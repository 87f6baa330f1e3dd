"""Files that are whole or not there, after a power cut as well.

A rename alone may reach the disk before the bytes do: what stands under the final name is then empty.
"""

import os
from pathlib import Path

__all__ = ["put_in_place"]


def put_in_place(aside: Path, target: Path) -> None:
    """Give a file or folder that was written aside its name: 1 its bytes are on the disk · 2 it is renamed · 3 the name
    is on the disk. Raises OSError, also where `target` is a folder with something in it."""
    for path in [*aside.rglob("*"), aside] if aside.is_dir() else [aside]:
        _sync(path)  # 1
    aside.replace(target)  # 2
    _sync(target.parent)  # 3


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
