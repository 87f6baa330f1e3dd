"""The operator's commands against a broker: what they send is what stands in the topic."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dylora_stream.bootstrap.parts import open_ledger
from dylora_stream.bootstrap.tools import newest_registry
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.ledger import Changes
from dylora_stream.core.messages import RawRecord, Topic
from dylora_stream.settings import Settings, load_settings
from dylora_stream.stream.changelog import KafkaChangelog

pytestmark = pytest.mark.kafka

Command = Callable[..., str]


@pytest.fixture
def settings(broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Topics of this test's own on the broker."""
    monkeypatch.chdir(tmp_path)
    prefix = f"commands.{os.getpid()}.{tmp_path.name}."
    flags = [f"kafka.bootstrap_servers={broker}", f"kafka.prefix={prefix}", "topics.requests_partitions=1"]
    return load_settings(flags=[*flags, f"store.folder={tmp_path / 'data'}"])


@pytest.fixture
def command(settings: Settings) -> Command:
    """Runs the command line with these settings; its output."""

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dylora_stream", *words, *settings.arguments],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return run


def requests_of(settings: Settings) -> list[RawRecord]:
    """The whole requests topic."""
    log = KafkaChangelog(settings.kafka, Topic.REQUESTS)
    try:
        return log.catch_up(20)
    finally:
        log.close()


def test_topics_are_absent_then_created_then_listed(command: Command) -> None:
    """list fails until create has run; create may run again."""
    assert "missing" in command("topics", "list", code=1)
    assert "requests" in command("topics", "create")
    assert "missing" not in command("topics", "list")
    assert "all topics exist" in command("topics", "create")


def test_produced_rows_arrive_as_requests_in_file_order(
    command: Command, settings: Settings, tmp_path: Path
) -> None:
    """Every row, keyed by the field that was named, and plain lines as text."""
    command("topics", "create")
    rows = [{"input": f"text {number}", "user": f"u{number % 2}"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lines.txt").write_text("first line\nsecond line\n")
    assert "20 records sent" in command("produce", "rows.jsonl", "--key-field", "user", "--rate", "1000")
    assert "1 records sent" in command("produce", "lines.txt", "--limit", "1")
    *requests, line = requests_of(settings)
    assert [json.loads(record.value or b"") for record in requests] == rows
    assert [record.key for record in requests[:3]] == [b"u0", b"u1", b"u0"]
    assert (line.value, line.headers) == (b"first line", (("content-type", b"text/plain"),))


def test_replayed_records_keep_keys_headers_and_times(
    command: Command, settings: Settings, tmp_path: Path
) -> None:
    """What was recorded stands in the topic again."""
    sent_ms = (
        time.time_ns() // 1_000_000 - 60_000
    )  # within any retention: brokers delete by the records' own times
    command("topics", "create")
    row = {
        "value_base64": "/wA=",
        "key": "k",
        "headers": {"traceparent": "00-1"},
        "timestamp_ms": sent_ms,
    }
    (tmp_path / "recorded.jsonl").write_text(json.dumps(row) + "\n")
    command("replay", "recorded.jsonl", "--keep-times")
    (record,) = requests_of(settings)
    assert (record.key, record.value) == (b"k", b"\xff\x00")
    assert record.headers == (("traceparent", b"00-1"),)
    assert record.timestamp_ms == sent_ms
    command("replay", "recorded.jsonl")
    assert [record.timestamp_ms > sent_ms for record in requests_of(settings)] == [False, True]


def test_without_experts_the_commands_say_so(command: Command, settings: Settings) -> None:
    """An empty registry is a state, not an error."""
    command("topics", "create")
    assert newest_registry(settings).experts == ()
    assert "backbone answers alone" in command("experts", "list")
    assert "none yet" in command("experts", "show", "e1", code=1)


def test_an_expert_is_retired_while_nothing_runs(command: Command, settings: Settings) -> None:
    """Also one whose files are gone: the database has it, and what the workers are to hear waits in its outbox."""
    damaged = ExpertVersion(
        expert_id="e-1",
        skill_id="s",
        version=1,
        parent=None,
        storage=StoredFolder(path="gone", sha256="0"),
        maturity=Maturity.MATURE,
    )
    with closing(open_ledger(settings)) as ledger:
        ledger.commit(Changes(registry=Registry().with_expert(damaged)))
    assert "there are: e-1" in command("experts", "retire", "e-2", "--yes", code=1)
    assert "when learn starts" in command("experts", "retire", "e-1", "--yes")
    with closing(open_ledger(settings)) as ledger:
        assert ledger.load().registry.experts == ()
        keys = [message.key for _, message in ledger.outbox() if message.topic is Topic.EXPERTS]
    assert keys == [b"e-1", b"registry"]
