"""Names of processes: no two have the same, and a restart keeps its own."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
from kafka.errors import FencedInstanceIdError

from dylora_stream.bootstrap.parts import instance_of
from dylora_stream.core.errors import StoreError
from dylora_stream.settings import Settings, load_settings
from dylora_stream.store.identity import Identity, claim_folder, claim_identity, folder_id
from dylora_stream.stream.broker import EmbeddedBroker
from dylora_stream.stream.kafka import translate


def settings_of(folder: Path, *flags: str) -> Settings:
    """Defaults on a data folder."""
    return load_settings(flags=[f"store.folder={folder}", *flags])


class Start(Protocol):
    """Starts a serve worker with these settings, as far as its name."""

    def __call__(self, folder: Path, *flags: str) -> Identity:
        """Who it is."""


@pytest.fixture
def started() -> Iterator[Start]:
    """Its locks are let go at the end."""
    with ExitStack() as locks:

        def start(folder: Path, *flags: str) -> Identity:
            identity = claim_identity(folder, "serve", instance_of(settings_of(folder, *flags)))
            locks.callback(identity.lock.close)
            return identity

        yield start


def test_two_machines_with_default_settings_have_two_names(tmp_path: Path, started: Start) -> None:
    """A shared name would let the second one fence the first, and the first, started again, the second."""
    first, second = started(tmp_path / "one"), started(tmp_path / "two")
    assert first.name != second.name


def test_a_restart_keeps_its_name_and_a_second_process_gets_another_number(
    tmp_path: Path, started: Start
) -> None:
    """The transactional id is taken over from the process that was killed, never from one that runs."""
    first, second = started(tmp_path), started(tmp_path)
    assert first.name != second.name
    first.lock.close()
    assert started(tmp_path).name == first.name


def test_a_folder_that_was_used_before_it_had_an_id_gets_one(tmp_path: Path, started: Start) -> None:
    """Its lock files stay what they are; an id file that a crash left empty is filled."""
    claim_identity(tmp_path, "serve", "0").lock.close()
    (tmp_path / "instance").touch()
    assert started(tmp_path).name == f"{folder_id(tmp_path)}-serve-0"


def test_processes_that_start_at_once_agree_on_the_folders_id(tmp_path: Path) -> None:
    """The file's lock lets one of them make it."""
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(folder_id, [tmp_path / "fresh"] * 64))
    assert len(found) == 1


def test_a_name_that_is_configured_is_kept(tmp_path: Path, started: Start) -> None:
    """For folders that are made anew at each start."""
    assert started(tmp_path, "kafka.instance=node-7").name == "node-7-serve-0"


def test_with_the_embedded_broker_the_name_is_always_the_same(tmp_path: Path, started: Start) -> None:
    """It never evicts a killed member: a process of another name would wait for its partitions for ever."""
    broker = EmbeddedBroker(tmp_path / "broker", 19092)
    broker.data_dir.mkdir()
    broker.mark(pid=1)
    address = f"kafka.bootstrap_servers={broker.bootstrap_servers}"
    assert started(tmp_path, address).name == "0-serve-0"


def test_who_is_fenced_reads_which_setting_to_change() -> None:
    """Another data folder is no remedy where the name is configured."""
    with pytest.raises(Exception, match=r"set kafka\.instance"):
        raise translate(FencedInstanceIdError(), "a transaction")


def test_a_data_folder_has_one_supervisor(tmp_path: Path) -> None:
    """The second says who has it; what a killed one left is nobody's."""
    with claim_folder(tmp_path), pytest.raises(StoreError, match=f"process {os.getpid()}"):
        claim_folder(tmp_path)
    claim_folder(tmp_path).close()
