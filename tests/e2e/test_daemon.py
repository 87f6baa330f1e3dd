"""The daemon, whole, with a tiny model: bad input, kill -9, its ends, its port, its commands, and wrong beginnings."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from daemons import (
    TINY,
    Daemon,
    command,
    count_fates,
    embedded_settings,
    read_dead_letters,
    read_events,
    settings_of,
    until,
    wait_for,
)
from models import tiny_llama

from dylora_stream import bootstrap
from dylora_stream.settings import Settings
from dylora_stream.stream.broker import free_port, glibc_problem

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(300)]

needs_embedded = pytest.mark.skipif(glibc_problem() is not None, reason="needs a newer glibc")

Record = tuple[bytes | None, bytes | None, tuple[tuple[str, bytes], ...]]

JSON = (("content-type", b"application/json"),)
BAD: dict[str, tuple[Record, str]] = {
    "malformed JSON": ((None, b'{"input": "a", ', ()), "malformed_json"),
    "a number as input": ((None, b'{"input": 7}', ()), "wrong_type"),
    "a list as record": ((None, b'["input"]', JSON), "wrong_type"),
    "no input": ((None, b'{"output": "a"}', ()), "missing_input"),
    "an empty input": ((None, b'{"input": " "}', ()), "empty_input"),
    "one text as choices": ((None, b'{"input": "a", "choices": "b"}', ()), "invalid_choices"),
    "no choice": ((None, b'{"input": "a", "choices": []}', ()), "invalid_choices"),
    "an output among no choices": (
        (None, b'{"input": "a", "choices": ["b", "c"], "output": "d"}', ()),
        "output_not_in_choices",
    ),
    "invalid UTF-8": ((b"key", b'{"input": "\xff\xfe"}', ()), "invalid_utf8"),
    "no value": ((b"key", None, ()), "empty_record"),
    "more than the model reads": ((None, b"x" * 900_000, ()), "input_too_long"),
}
HUGE: Record = (None, json.dumps({"input": "x" * 10_000_000}).encode(), ())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder."""
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Daemon]:
    """One daemon for all tests that leave it running."""
    problem = glibc_problem()
    if problem is not None:
        pytest.skip(problem)
    with embedded_settings(tmp_path_factory.mktemp("shared"), model, *TINY) as settings:
        bootstrap.create_topics(settings)
        with Daemon(settings) as daemon:
            yield daemon


@pytest.fixture
def daemon(running: Daemon) -> Daemon:
    """That daemon, ready, whatever a former test did to it."""
    running.wait_until_ready()
    return running


def requests(count: int, name: str, *, labelled: bool = False) -> list[dict[str, str]]:
    """Distinct inputs, with right answers where asked for."""
    inputs = [f"{name} {number}" for number in range(count)]
    return [{"input": text, "output": text.upper()} if labelled else {"input": text} for text in inputs]


def kill_in_mid_stream(daemon: Daemon, role: str, name: str, *, labelled: bool = False) -> None:
    """SIGKILL to a role while records are being answered, and to the end of the stream: each record has one fate."""
    with bootstrap.Traffic(daemon.settings) as traffic:
        first = traffic.send(requests(100, name, labelled=labelled))
        wait_for(traffic, first[:10])
        before = daemon.pid(role)
        daemon.kill(role)
        positions = first + traffic.send(requests(60, f"{name} later", labelled=labelled))
        wait_for(traffic, positions, 120)
        until(lambda: daemon.pid(role) != before)
        daemon.wait_until_ready()
    fates = count_fates(daemon.settings)
    assert {position: fates[position] for position in positions} == dict.fromkeys(positions, 1)


def assert_learned_once(daemon: Daemon, name: str) -> None:
    """Each record of this name is one row, and no event of learn was published twice."""
    positions = set()

    def has_all() -> bool:
        stats = json.loads(daemon.ask("/stats", role="learn")[1] or "{}")
        return sum(stats["rows"].values()) >= len(positions)

    positions.update(position for position in bootstrap.read_positions(daemon.settings, bootstrap_topic()))
    until(has_all)
    ids = [event.id for event in read_events(daemon.settings)]
    assert len(ids) == len(set(ids))


