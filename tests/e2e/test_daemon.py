"""The daemon, whole, with a tiny model: bad input, kill -9, its ends, its port, its commands, and wrong beginnings."""

import json
import os
import signal
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
    has_fate,
    listen,
    read_dead_letters,
    read_events,
    settings_of,
    until,
)
from kafka import KafkaAdminClient
from models import tiny_llama

from dylora_stream import bootstrap
from dylora_stream.core.messages import Topic
from dylora_stream.settings import Settings
from dylora_stream.stream.broker import EmbeddedBroker, free_port, glibc_problem
from dylora_stream.stream.kafka import client_options

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
WIDE_BYTES = 16 * 1024 * 1024
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
        create_wide_requests(settings)
        bootstrap.create_topics(settings)
        with Daemon(settings) as daemon:
            yield daemon


@pytest.fixture
def daemon(running: Daemon) -> Daemon:
    """That daemon, ready, whatever a former test did to it."""
    running.wait_until_ready()
    return running


def create_wide_requests(settings: Settings) -> None:
    """The requests topic as a user may have it: 16 MB a record."""
    admin = KafkaAdminClient(**client_options(settings.kafka, "admin"))
    wide = {"num_partitions": 2, "replication_factor": 1, "configs": {"max.message.bytes": str(WIDE_BYTES)}}
    admin.create_topics({settings.kafka.topic(Topic.REQUESTS): wide}, wait_for_metadata=True)
    admin.close()


def requests(count: int, name: str, *, labelled: bool = False) -> list[dict[str, str]]:
    """Distinct inputs, with right answers where asked for."""
    inputs = [f"{name} {number}" for number in range(count)]
    return [{"input": text, "output": text.upper()} if labelled else {"input": text} for text in inputs]


def kill_in_mid_stream(daemon: Daemon, role: str, name: str, *, labelled: bool = False) -> None:
    """SIGKILL to a role while records are being answered; at the end of the stream each record has one fate."""
    with bootstrap.Traffic(daemon.settings) as traffic:
        first = traffic.send(requests(200, name, labelled=labelled))
        heard = bootstrap.Heard()
        listen(traffic, heard, lambda heard: has_fate(heard, first[:10]))
        before = daemon.pid(role)
        daemon.kill(role)
        if role == "serve":
            assert set(first) - count_fates(daemon.settings).keys(), (
                "it had answered all before it was killed"
            )
        positions = first + traffic.send(requests(60, f"{name} later", labelled=labelled))
        listen(traffic, heard, lambda heard: has_fate(heard, positions), 120)
        until(lambda: daemon.pid(role) != before)
        daemon.wait_until_ready()
    fates = count_fates(daemon.settings)
    assert {position: fates[position] for position in positions} == dict.fromkeys(positions, 1)


def assert_learned_once(daemon: Daemon) -> None:
    """Each answered record is one row, none waits for a job that was lost, and no event was published twice."""
    answered = len(bootstrap.read_positions(daemon.settings, Topic.RESULTS))
    until(lambda: sum(daemon.stats()["rows"].values()) >= answered)
    assert sum(daemon.stats()["rows"].values()) == answered
    until(lambda: not daemon.stats()["rows"].get("waiting"))
    ids = [event.id for event in read_events(daemon.settings)]
    assert len(ids) == len(set(ids))


def ends_by(number: signal.Signals, settings: Settings) -> Daemon:
    """A daemon that was sent this signal while it had records to answer; it has ended."""
    bootstrap.create_topics(settings)
    with Daemon(settings) as daemon:
        daemon.wait_until_ready()
        with bootstrap.Traffic(settings) as traffic:
            positions = traffic.send(requests(80, "last"))
            listen(traffic, bootstrap.Heard(), lambda heard: has_fate(heard, positions[:5]))
        daemon.process.send_signal(number)
        daemon.process.wait(60)
    return daemon


def test_each_bad_record_is_one_dead_letter_and_its_neighbours_are_answered(daemon: Daemon) -> None:
    """Whatever the bytes are: a reason, the original, and the stream goes on. 10 MB come back as a pointer."""
    wide = replace(daemon.settings.kafka, max_message_bytes=WIDE_BYTES)
    bad = {**BAD, "10 MB": (HUGE, "too_large")}
    with bootstrap.Traffic(daemon.settings.model_copy(update={"kafka": wide})) as traffic:
        reasons, good = {}, []
        for name, (record, reason) in bad.items():
            good += traffic.send([{"input": f"before {name}"}])
            (position,) = traffic.send_raw([record])
            reasons[position] = reason
        good += traffic.send([{"input": "after all"}])
        listen(traffic, bootstrap.Heard(), lambda heard: has_fate(heard, [*good, *reasons]))
    letters = {str(letter.record.position): letter for letter in read_dead_letters(daemon.settings)}
    assert {position: letters[position].reason for position in reasons} == reasons
    fates = count_fates(daemon.settings)
    assert {fates[position] for position in [*good, *reasons]} == {1}
    assert not set(good) & letters.keys()
    originals = {
        position: record[1] or b"" for position, (record, _) in zip(reasons, bad.values(), strict=True)
    }
    for position, original in originals.items():
        assert original.startswith(letters[position].record.value or b"")


def test_serve_killed_in_the_middle_answers_every_record_once(daemon: Daemon) -> None:
    """The supervisor starts it again; a fresh reader counts each position once."""
    kill_in_mid_stream(daemon, "serve", "killed serve")


def test_learn_killed_in_the_middle_keeps_every_row_and_event_once(daemon: Daemon) -> None:
    """Answers go on meanwhile; rows, jobs and outbox are taken up where DuckDB has them."""
    kill_in_mid_stream(daemon, "learn", "killed learn", labelled=True)
    assert_learned_once(daemon)


def test_the_ports_answer_while_it_runs(daemon: Daemon) -> None:
    """Health, readiness and metrics of both roles; novelty of serve, which refuses what is no question."""
    for role in ("serve", "learn"):
        assert daemon.ask("/healthz", role=role)[0] == 200
        assert daemon.ask("/readyz", role=role)[0] == 200
        status, metrics = daemon.ask("/metrics", role=role)
        assert (status, "# TYPE dylora_" in metrics) == (200, True)
    status, body = daemon.ask("/novelty", {"input": "is this new?"})
    assert (status, json.loads(body)["is_novel"], json.loads(body)["p_value"]) == (200, True, None)
    assert daemon.ask("/novelty", {"input": ""})[0] == 400
    assert daemon.ask("/novelty", {"input": "a"}, role="learn")[0] == 503


def test_commands_answer_beside_a_running_daemon(daemon: Daemon) -> None:
    """score, samples stats, experts list and doctor ask the running processes."""
    scored = daemon.command("score", "is this new?")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["is_novel"] is True
    for words, said in (
        (("samples", "stats"), "rows wanted"),
        (("experts", "list"), "No expert yet"),
        (("topics", "list"), "requests"),
        (("doctor",), "only one learn may use this data folder"),
    ):
        done = daemon.command(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert said in " ".join(done.stdout.split()), words


def test_a_second_learn_on_the_same_database_says_who_has_it(daemon: Daemon) -> None:
    """Exit code 4, the file, and what to do; the first one goes on."""
    done = daemon.command("run", "--role", "learn")
    assert done.returncode == 4, done.stderr
    assert "learn.duckdb is open in another process" in done.stderr
    assert "store.folder" in done.stderr
    daemon.wait_until_ready()


@needs_embedded
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_drains_both_roles_and_ends_with_code_0(
    number: signal.Signals, model: Path, tmp_path: Path
) -> None:
    """What was taken is committed once, nothing is killed, and no process stays behind."""
    with embedded_settings(tmp_path, model, *TINY) as settings:
        daemon = ends_by(number, settings)
        fates = count_fates(settings)
    assert daemon.process.returncode == 0
    said = [line["event"] for line in daemon.said()]
    assert said.count("worker_stopped") == 2
    assert "role_killed" not in said
    assert "Fatal Python error" not in daemon.log.read_text(errors="replace")
    assert set(fates.values()) == {1}
    for role in ("serve", "learn"):
        with pytest.raises(ProcessLookupError):
            os.kill(daemon.pid(role), 0)


def test_a_wrong_setting_ends_with_code_2_and_what_would_be_right(tmp_path: Path) -> None:
    """A misspelt name and a value out of range, before anything is started."""
    done = command("run", "--set", "serve.batch_record=3", folder=tmp_path)
    assert (done.returncode, "did you mean serve.batch_records?" in done.stderr) == (2, True)
    done = command("run", "--set", "serve.batch_records=0", folder=tmp_path)
    assert (done.returncode, "must be at least 1" in done.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


def test_without_a_broker_it_retries_as_long_as_configured_and_ends_with_code_3(
    model: Path, tmp_path: Path
) -> None:
    """It says so at each attempt, and at the end what to start."""
    settings = settings_of(f"127.0.0.1:{free_port()}", tmp_path, model, *TINY, "kafka.connect_timeout_s=2")
    began_s = time.monotonic()
    done = command("run", *settings.arguments, folder=tmp_path)
    assert (done.returncode, time.monotonic() - began_s >= 2) == (3, True), done.stderr
    assert done.stderr.count("broker_unreachable") >= 2
    assert "dylora-stream broker" in done.stderr


@needs_embedded
def test_a_broker_that_comes_late_is_waited_for(model: Path, tmp_path: Path) -> None:
    """The roles start once it answers."""
    port = free_port()
    settings = settings_of(f"127.0.0.1:{port}", tmp_path, model, *TINY, "kafka.connect_timeout_s=60")
    with Daemon(settings) as daemon:
        until(lambda: "broker_unreachable" in daemon.log.read_text())
        with EmbeddedBroker(tmp_path / "data" / "broker", port):
            daemon.wait_until_ready()
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(60) == 0


@pytest.mark.parametrize("holds", [{"notes.txt": "mine"}, {"config.json": "no", "model.safetensors": "no"}])
def test_a_model_folder_that_is_none_ends_with_code_5(
    holds: dict[str, str], running: Daemon, tmp_path: Path
) -> None:
    """Other files, or files that do not load: which folder, and what to do. Nothing is written into it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in holds.items():
        (folder / name).write_text(text)
    settings = settings_of(running.settings.kafka.bootstrap_servers, tmp_path, folder, *TINY)
    done = command("run", *settings.arguments, folder=tmp_path)
    assert done.returncode == 5, done.stderr
    assert str(folder) in done.stderr
    assert "model.folder" in done.stderr
    assert {path.name for path in folder.iterdir()} == set(holds)


@pytest.mark.parametrize("role", ["serve", "learn"])
def test_on_a_real_kafka_kill_9_twice_loses_and_repeats_nothing(
    role: str, real_broker: str, model: Path, tmp_path: Path
) -> None:
    """Twice in one stream; each position has one fate, each row is kept once, each event was published once."""
    settings = settings_of(real_broker, tmp_path, model, *TINY)
    bootstrap.create_topics(settings)
    with Daemon(settings) as daemon:
        daemon.wait_until_ready()
        for turn in ("first", "second"):
            kill_in_mid_stream(daemon, role, turn, labelled=True)
        assert_learned_once(daemon)
