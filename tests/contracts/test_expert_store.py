"""One contract for the expert store, over folders and over the in-memory double; then what only files can suffer."""

import errno
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dylora_stream.core.errors import DiskFull, ExpertCorrupt, SettingsError, StoreError
from dylora_stream.core.experts import StoredFolder
from dylora_stream.core.ports import ExpertStore
from dylora_stream.store.experts import FolderStore, folder_digest
from dylora_stream.testing import MemoryExpertStore

DEADLINE_S = 20.0  # of what another thread does at once


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ExpertStore:
    """Both implementations, empty."""
    return folder_store(tmp_path) if request.param == "folder" else MemoryExpertStore()


def folder_store(root: Path) -> FolderStore:
    """A store on this disk, without memory of what it verified."""
    return FolderStore(str(root / "store"), root / "cache")


def expert(folder: Path, **texts: str) -> Path:
    """A folder with these files, one of them a level down."""
    (folder / "deep").mkdir(parents=True)
    for name, text in {"adapter": "weights", "deep/report": "numbers", **texts}.items():
        (folder / name).write_text(text)
    return folder


def test_a_stored_folder_is_read_back_whole(store: ExpertStore, tmp_path: Path) -> None:
    """Names and bytes, folders within it too."""
    opened = store.open(store.put(expert(tmp_path / "one")))
    assert (opened / "adapter").read_text() == "weights"
    assert (opened / "deep" / "report").read_text() == "numbers"
    assert folder_digest(opened) == folder_digest(tmp_path / "one")


def test_the_same_content_twice_is_one_entry(store: ExpertStore, tmp_path: Path) -> None:
    """Whatever its folder is called; other content or another name is another entry."""
    first = store.put(expert(tmp_path / "one"))
    assert store.put(expert(tmp_path / "two")) == first
    assert store.open(first) == store.open(store.put(tmp_path / "two"))
    other = store.put(expert(tmp_path / "three", adapter="other weights"))
    renamed = store.put(expert(tmp_path / "four", more=""))
    assert len({first.sha256, other.sha256, renamed.sha256}) == 3


@pytest.mark.parametrize(
    "path", ["../outside", "/etc", "ab/../../outside", "", "ab", f"ab/{'0' * 64}/..", f"../ab/{'0' * 64}"]
)
def test_a_path_that_points_elsewhere_is_refused(store: ExpertStore, path: str) -> None:
    """Paths come out of messages; only the one form that the store writes is followed."""
    with pytest.raises(ExpertCorrupt):
        store.open(StoredFolder(path=path, sha256="0" * 64))


def test_a_path_and_a_digest_that_differ_are_refused(tmp_path: Path) -> None:
    """A message cannot name one folder and vouch for it with another's digest."""
    store = folder_store(tmp_path)
    first, second = store.put(expert(tmp_path / "one")), store.put(expert(tmp_path / "two", adapter="x"))
    store.open(second)
    with pytest.raises(ExpertCorrupt):
        store.open(StoredFolder(path=first.path, sha256=second.sha256))


@pytest.mark.parametrize("damage", ["changed", "added", "missing", "gone"])
def test_a_damaged_folder_is_reported_with_what_to_do(tmp_path: Path, damage: str) -> None:
    """A byte changed, a file more or less, or the whole folder gone: restore it, or retire the expert."""
    stored = folder_store(tmp_path).put(expert(tmp_path / "one"))
    folder = tmp_path / "store" / stored.path
    match damage:
        case "changed":
            (folder / "adapter").write_text("weightz")
        case "added":
            (folder / "extra").write_text("")
        case "missing":
            (folder / "deep" / "report").unlink()
        case "gone":
            folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ExpertCorrupt, match="retire the expert"):
        folder_store(tmp_path).open(stored)


def test_nothing_half_written_is_left_where_readers_look(tmp_path: Path) -> None:
    """After a put there is one entry under its digest, and nothing left aside."""
    stored = folder_store(tmp_path).put(expert(tmp_path / "one"))
    root = tmp_path / "store"
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert found == [f"{stored.path}/adapter", f"{stored.path}/deep/report"]


@pytest.mark.parametrize("url", ["folder", "memory://interrupted"])
def test_a_copy_that_was_interrupted_is_finished_by_the_next(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a folder never counts as stored, and leaves nothing behind on this disk."""
    root = str(tmp_path / "store") if url == "folder" else url
    folder = expert(tmp_path / "one")
    copied: list[str] = []

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def second_fails(*arguments: Any, **options: Any) -> Any:
            copied.append(str(arguments[-1]))
            if len(copied) == 2:
                raise OSError(errno.ENOSPC, "no room")
            return real(*arguments, **options)

        return second_fails

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", failing(LocalFileSystem.put_file))
        patch.setattr(MemoryFileSystem, "put_file", failing(MemoryFileSystem.put_file))
        with pytest.raises(DiskFull):
            FolderStore(root, tmp_path / "cache").put(folder)
    assert len(copied) == 2
    assert [path for path in tmp_path.glob("store/**/*") if path.is_file()] == []
    stored = FolderStore(root, tmp_path / "cache").put(folder)
    assert folder_digest(FolderStore(root, tmp_path / "cache").open(stored)) == stored.sha256


def test_a_remote_folder_is_fetched_through_the_cache(tmp_path: Path) -> None:
    """Any fsspec URL: read once, verified, and read from the cache afterwards."""
    url = "memory://experts-of-this-test"
    stored = FolderStore(url, tmp_path / "unused").put(expert(tmp_path / "one"))
    opened = FolderStore(url, tmp_path / "cache").open(stored)
    assert opened.is_relative_to(tmp_path / "cache")
    assert folder_digest(opened) == stored.sha256


def test_two_workers_that_fetch_at_once_both_get_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share a data folder and its cache: the slower one takes what the quicker one has put there."""
    url = "memory://fetched-at-once"
    stored = FolderStore(url, tmp_path / "unused").put(expert(tmp_path / "one"))
    workers = [FolderStore(url, tmp_path / "cache") for _ in range(2)]
    meeting, turn, get = threading.Barrier(2), threading.Lock(), MemoryFileSystem.get

    def met(*arguments: Any, **options: Any) -> None:
        with turn:  # a file of this storage has one place to read at, for all its readers
            get(*arguments, **options)
        meeting.wait(DEADLINE_S)  # until the other one has it too

    monkeypatch.setattr(MemoryFileSystem, "get", met)
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda worker: worker.open(stored), workers))
    assert opened[0] == opened[1]
    assert folder_digest(opened[0]) == stored.sha256
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [stored.sha256[:2]]


def test_a_fetched_folder_that_is_damaged_is_fetched_again(tmp_path: Path) -> None:
    """The cache is no place to restore from a backup: asking once more mends it."""
    url = "memory://damaged-in-the-cache"
    stored = FolderStore(url, tmp_path / "unused").put(expert(tmp_path / "one"))
    opened = FolderStore(url, tmp_path / "cache").open(stored)
    (opened / "adapter").write_text("weightz")
    worker = FolderStore(url, tmp_path / "cache")
    with pytest.raises(ExpertCorrupt):
        worker.open(stored)
    assert folder_digest(worker.open(stored)) == stored.sha256


def test_a_storage_that_does_not_answer_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its client raises."""
    url = "memory://silent"
    stored = FolderStore(url, tmp_path / "unused").put(expert(tmp_path / "one"))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route to the bucket")

    monkeypatch.setattr(MemoryFileSystem, "get", fail)
    with pytest.raises(ExpertCorrupt, match="no route to the bucket"):
        FolderStore(url, tmp_path / "cache").open(stored)


@pytest.mark.parametrize("url", ["s3://bucket/experts", "nosuch://bucket/experts"])
def test_a_storage_that_nothing_here_reads_is_a_wrong_setting(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart would not mend it: it is said with the setting's name, and the process ends."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SettingsError, match=f"store.experts is {url}"):
        FolderStore(url, tmp_path / "cache")


def test_a_storage_is_looked_at_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the doctor asks: a store that is not there yet is well, one that refuses or is a file is not."""
    assert folder_store(tmp_path).check() == str(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="set store.experts"):
        FolderStore(str(tmp_path / "file" / "below"), tmp_path / "cache").check()
    remote = FolderStore("memory://not-there", tmp_path / "cache")
    assert remote.check() == "/not-there"

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    with pytest.raises(StoreError, match="cannot be reached: no credentials"):
        remote.check()
    monkeypatch.setattr(MemoryFileSystem, "find", refuse)
    with pytest.raises(StoreError, match="cannot be written: no credentials"):
        remote.put(expert(tmp_path / "one"))
