"""What has its final name is on the disk."""

import os
from pathlib import Path

import pytest

from dylora_stream.core.durable import put_in_place


@pytest.mark.parametrize("is_folder", [False, True])
def test_bytes_reach_the_disk_before_the_name_and_the_name_after_it(
    is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder of it is forced out while it is still aside, its parent once it is not."""
    synced: list[tuple[int, bool]] = []  # inode, and whether the target was there
    aside, target = tmp_path / "aside", tmp_path / "target"
    force = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, target.exists()))
        force(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    if is_folder:
        (aside / "deep").mkdir(parents=True)
        (aside / "deep" / "file").write_text("bytes")
    else:
        aside.write_text("bytes")
    parts = {path.stat().st_ino for path in [aside, *aside.rglob("*")]}
    put_in_place(aside, target)
    assert not aside.exists()
    assert ((target / "deep" / "file") if is_folder else target).read_text() == "bytes"
    assert {inode for inode, was_there in synced if not was_there} == parts
    assert [inode for inode, was_there in synced if was_there] == [tmp_path.stat().st_ino]
