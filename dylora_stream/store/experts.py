"""The expert store: folders under content addresses, on any fsspec URL.

A folder's digest is over its files' names and bytes; the same content twice is one entry. On this machine it is copied
aside and renamed once the disk has it, so that a reader sees it whole or not at all. No rename of a remote folder is
one step: there its files go to their places one by one, the digest tells a reader of a half one, and who puts it again
finishes it. Remote folders are read through a local cache. A `StoredFolder.path` comes out of messages, so it is
checked against the one form this store writes: it can never point outside.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import fsspec

from dylora_stream.core.durable import put_in_place
from dylora_stream.core.errors import DiskFull, ExpertCorrupt, SettingsError, StoreError
from dylora_stream.core.experts import StoredFolder

__all__ = ["FolderStore", "folder_digest"]

STORED_PATH = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a folder's files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


class FolderStore:
    """`core.ports.ExpertStore` on fsspec.

    Invariant: a folder once verified by this process is not hashed again; its files never change.
    """

    def __init__(self, url: str, cache: Path) -> None:
        """Raises SettingsError for a URL that nothing here can read, StoreError where its storage does not answer."""
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise SettingsError(
                f"store.experts is {url}, which cannot be used here: {error}. Install the fsspec package of that "
                "storage into this environment, or correct store.experts"
            ) from error
        except Exception as error:  # some storages are asked at once, each by a client with errors of its own
            raise StoreError(f"the expert store {url} cannot be reached: {error}") from error
        self._is_local = "file" in (
            self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        )
        self._cache = cache
        self._verified: set[str] = set()

    def check(self) -> str:
        """Where it is, for the doctor; writes nothing. Raises StoreError where it cannot be reached or written."""
        if self._is_local:
            root = Path(self._root)
            place = next(path for path in (root, *root.parents) if path.exists())
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                raise StoreError(
                    f"the expert store {root} cannot be written: set store.experts to a folder that can"
                )
            return str(root)
        try:
            self._fs.info(self._root)
        except FileNotFoundError:
            pass  # nothing has been written there yet
        except Exception as error:  # each kind of storage has a client with errors of its own
            raise StoreError(f"the expert store {self._root} cannot be reached: {error}") from error
        return str(self._root)

    def put(self, folder: Path) -> StoredFolder:
        """See the port."""
        sha256 = folder_digest(folder)
        stored = StoredFolder(path=f"{sha256[:2]}/{sha256}", sha256=sha256)
        target = f"{self._root}/{stored.path}"
        try:
            if self._is_local:
                self._put_in_place(folder, Path(target))
            elif not self._has_all(folder, target):
                self._fs.put(f"{folder}/", f"{target}/", recursive=True)
        except Exception as error:  # each kind of storage has a client with errors of its own
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise DiskFull(f"no room left in the expert store {self._root}; free some space") from error
            raise StoreError(f"the expert store {self._root} cannot be written: {error}") from error
        return stored

    def _put_in_place(self, folder: Path, target: Path) -> None:
        """Learn alone writes: what lies aside is a copy that was interrupted."""
        if target.exists():
            return
        aside = Path(self._root) / "aside" / target.name
        try:
            shutil.rmtree(aside, ignore_errors=True)
            for parent in (aside.parent, target.parent):
                parent.mkdir(parents=True, exist_ok=True)
            self._fs.put(f"{folder}/", f"{aside}/", recursive=True)
            put_in_place(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _has_all(self, folder: Path, target: str) -> bool:
        """Whether a copy was finished: the storage has every file, by name and size."""
        wanted = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file()
        }
        found = self._fs.find(target, detail=True)
        return (
            wanted.items() <= {name[len(target) + 1 :]: info["size"] for name, info in found.items()}.items()
        )

    def open(self, stored: StoredFolder) -> Path:
        """See the port."""
        if not STORED_PATH.fullmatch(stored.path) or not stored.path.endswith(stored.sha256):
            raise ExpertCorrupt(f"not a path of this store: {stored.path!r}")
        folder = Path(self._root) / stored.path if self._is_local else self._fetch(stored)
        if stored.sha256 in self._verified:
            return folder
        if not folder.is_dir():
            raise ExpertCorrupt(f"{folder} is missing; restore it from a backup, or retire the expert")
        try:
            is_whole = folder_digest(folder) == stored.sha256
        except OSError as error:
            raise ExpertCorrupt(f"{folder} cannot be read: {error}") from error
        if not is_whole:
            if not self._is_local:
                shutil.rmtree(folder, ignore_errors=True)  # the next one to ask fetches it again
            raise ExpertCorrupt(
                f"{folder} is not what its digest says; restore it from a backup, or retire the expert"
            )
        self._verified.add(stored.sha256)
        return folder

    def _fetch(self, stored: StoredFolder) -> Path:
        """The folder in the cache, unverified. Other processes may use the same cache at the same time."""
        target = self._cache / stored.path
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=self._cache))
        try:
            self._fs.get(f"{self._root}/{stored.path}/", f"{aside}/", recursive=True)
            aside.rename(target)
        except Exception as error:  # each kind of storage has a client with errors of its own
            shutil.rmtree(aside, ignore_errors=True)
            if not target.is_dir():  # else another process was quicker
                raise ExpertCorrupt(f"{stored.path} cannot be fetched from {self._root}: {error}") from error
        return target
