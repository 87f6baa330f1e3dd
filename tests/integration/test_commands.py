"""The operator's commands against a broker: what they send is what stands in the topic."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from daemons import until
from kafka import KafkaProducer

from dylora_stream.bootstrap.parts import open_ledger
from dylora_stream.bootstrap.tools import newest_registry, sender, topic_states
from dylora_stream.core.errors import TopicMissing
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.ledger import Changes
from dylora_stream.core.messages import DeadLetter, Position, RawRecord, Topic
from dylora_stream.ops.files import FileRecord
from dylora_stream.settings import Settings, load_settings
from dylora_stream.stream import codec
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.kafka import client_options
from dylora_stream.stream.topics import TopicLayout

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


def test_a_new_broker_is_no_fault_for_the_doctor(
    command: Command, settings: Settings, tmp_path: Path
) -> None:
    """What the first start makes, topics and database, may be missing; the doctor does not make it either."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    words = ("doctor", "--set", "http.port=0", "--set", "model.folder=model")
    assert "the first start makes its topic" in command(*words)
    assert not (settings.store.folder / "learn.duckdb").exists()
    assert "no topic" in command(*words, "--set", "topics.create=false", code=1)


def test_produce_before_the_first_start_makes_the_topic_as_the_settings_say(settings: Settings) -> None:
    """A broker that makes it for the first record gives it one partition, whatever topics.requests_partitions is."""
    wanted = settings.model_copy(update={"topics": TopicLayout(requests_partitions=3)})
    refused = settings.model_copy(update={"topics": TopicLayout(create=False)})
    with pytest.raises(TopicMissing, match="dylora-stream topics create"), sender(refused):
        pass
    with sender(wanted) as send:
        send(FileRecord(value=b"first"))
    made = {state.topic: state.partitions for state in topic_states(settings)}
    assert (made[Topic.REQUESTS], made[Topic.RESULTS]) == (3, 0)


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


def test_a_stream_that_stops_says_how_many_were_sent(
    command: Command, settings: Settings, tmp_path: Path
) -> None:
    """By a line that is none, and by a signal: a second run would send them twice."""
    command("topics", "create")
    (tmp_path / "rows.jsonl").write_text('{"input": "a"}\n' * 3 + "{")
    said = command("produce", "rows.jsonl", code=1)
    assert "stopped after 3 records" in said
    assert "rows.jsonl:4 is not JSON" in said
    assert len(requests_of(settings)) == 3
    (tmp_path / "lines.txt").write_text("a\n" * 1000)
    words = ("produce", "lines.txt", "--rate", "1", *settings.arguments)
    with subprocess.Popen(
        [sys.executable, "-m", "dylora_stream", *words], stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: len(requests_of(settings)) > 3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    sent = len(requests_of(settings)) - 3
    assert f"stopped after {sent} records" in said


def test_a_recording_that_never_began_leaves_no_file(command: Command, tmp_path: Path) -> None:
    """The same command works once the topic is there; a file of somebody else's is not said to hold anything."""
    assert "there is no topic" in command("record", "results", "out.jsonl", code=3)
    assert not (tmp_path / "out.jsonl").exists()
    command("topics", "create")
    assert "0 records in out.jsonl" in command("record", "results", "out.jsonl")
    (tmp_path / "mine.jsonl").write_text("{}\n")
    assert "records in" not in command("record", "results", "mine.jsonl", code=1)


def test_a_recorded_topic_is_replayed_byte_for_byte(
    command: Command, settings: Settings, tmp_path: Path
) -> None:
    """Text, bytes that are no text, headers and keys; a file that is there already is left alone."""
    command("topics", "create")
    rows = [
        {"value": "plain", "key": "k", "headers": [["a", "1"], ["a", {"base64": "/w=="}]]},
        {"value": {"base64": "/wA="}, "key": {"base64": "gA=="}},
        {"value": None, "key": "gone"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("replay", "rows.jsonl")
    assert "3 records" in command("record", "requests", "copy.jsonl")
    command("replay", "copy.jsonl")
    sent = [(record.key, record.value, record.headers) for record in requests_of(settings)]
    assert sent[:3] == sent[3:]
    assert sent[0] == (b"k", b"plain", (("a", b"1"), ("a", b"\xff")))
    assert sent[1][:2] == (b"\x80", b"\xff\x00")
    assert "exists already" in command("record", "requests", "copy.jsonl", code=1)
    assert "2 records" in command("record", "requests", "two.jsonl", "--follow", "--limit", "2")


def test_dead_letters_are_shown_and_sent_again(command: Command, settings: Settings) -> None:
    """Requests by their reason, as they were; one of which only the head was kept, and a sample, are passed over."""
    command("topics", "create")
    assert "No dead letter" in command("dead-letters", "list")
    requests, samples = (settings.kafka.topic(topic) for topic in (Topic.REQUESTS, Topic.SAMPLES))
    letters = [
        DeadLetter(
            record=RawRecord(position=Position(topic, 0, number), value=value, headers=(("h", b"1"),)),
            stage="decode",
            reason=reason,
            message="why",
        )
        for number, (topic, value, reason) in enumerate(
            [
                (requests, b"{", "invalid_json"),
                (requests, b"x" * 2_000_000, "too_large"),
                (samples, b"s", "wrong_type"),
            ]
        )
    ]
    producer = KafkaProducer(**client_options(settings.kafka, "letters"))
    for message in map(codec.encode_dead_letter, letters):
        topic = settings.kafka.topic(message.topic)
        producer.send(topic, key=message.key, value=message.value, headers=list(message.headers))
    producer.close()
    shown = command("dead-letters", "list")
    assert all(word in shown for word in ("invalid_json", "too_large", "wrong_type"))
    assert "too_large" not in command("dead-letters", "list", "--reason", "invalid_json")
    assert "0 requests sent again, 1 passed over" in command(
        "dead-letters", "replay", "--reason", "too_large"
    )
    assert "1 requests sent again, 2 passed over" in command("dead-letters", "replay")
    (again,) = requests_of(settings)
    assert (again.value, again.headers) == (b"{", (("h", b"1"),))


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
