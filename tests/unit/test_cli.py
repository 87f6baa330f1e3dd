"""The command line: it teaches, it ends with the right code, and it never shows a traceback for what a person did."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from dylora_stream.cli import app
from dylora_stream.cli.tables import show
from dylora_stream.core.errors import DyloraError
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder

COMMANDS = [
    ("run",), ("broker",), ("produce",), ("record",), ("replay",), ("score",), ("doctor",), ("config", "show"),
    ("model", "fetch"), ("dead-letters", "list"), ("dead-letters", "replay"),
    ("version",), ("demo",), ("rehearse",), ("bench", "throughput"), ("bench", "continual"), ("bench", "novelty"),
    ("experts", "list"), ("experts", "show"), ("experts", "export"), ("experts", "retire"), ("samples", "stats"),
    ("topics", "list"), ("topics", "create"), ("child",),
]  # fmt: skip


def environment(**changes: str) -> dict[str, str]:
    """The test's own variables without the settings', and the changes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DYLORA_")}
    return kept | changes


def run(*arguments: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dylora_stream", *arguments],
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    """--help works everywhere and says more than the command's name."""
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0, shown.output
    assert len(shown.output.split()) > 20


def test_the_list_above_is_complete() -> None:
    """A new command is tested too."""
    group = typer.main.get_command(app)
    found = set()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {(name, child) for child in inner} if inner else {(name,)}
    assert found == set(COMMANDS)


def test_help_teaches_the_first_steps() -> None:
    """Without arguments one learns how to begin, and what to do when it fails."""
    shown = CliRunner().invoke(app, ["--help"]).output
    for word in ("demo", "broker", "run", "produce", "doctor", "config show"):
        assert word in shown


def test_help_loads_no_library_that_is_slow_to_load() -> None:
    """--help is there at once."""
    code = (
        "import sys; from typer.testing import CliRunner; from dylora_stream.cli import app; "
        "CliRunner().invoke(app, ['--help']); "
        "print([name for name in ('torch', 'duckdb', 'kafka', 'pydantic', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() in ("[]", "['numpy']"), done.stderr


def test_a_misspelt_variable_ends_with_code_2(tmp_path: Path) -> None:
    """One line on stderr says which, and what would be right; no traceback."""
    done = run("config", "show", folder=tmp_path, DYLORA_MODEL__STEM_LAYER="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: there is no setting DYLORA_MODEL__STEM_LAYER; did you mean DYLORA_MODEL__STEM_LAYERS?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--set", "model.stem_layers=0"), "model.stem_layers is 0: it must be at least 1"),
        (("run", "--config", "absent.toml"), "absent.toml"),
        (("run", "--role", "both-of-them"), "both-of-them"),
        (("produce", "absent.jsonl"), "absent.jsonl"),
        (("demo", "--report", "/dev/null/report.json"), "cannot be written"),
        (("bench", "throughput", "--report", "."), "cannot be written"),
        (("bench", "continual", "--data", ".", "--report", "."), "cannot be written"),
        (("bench", "novelty", "--data", ".", "--report", "."), "cannot be written"),
        (("rnu",), "rnu"),
    ],
)
def test_wrong_arguments_end_with_code_2(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """Ours and the parser's alike."""
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_cannot_be_read_ends_with_code_1(tmp_path: Path) -> None:
    """Before anything is sent, in one line."""
    (tmp_path / "rows.parquet").write_text("none")
    done = run("produce", "rows.parquet", folder=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith("error: rows.parquet cannot be read as parquet")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("run",), 4),
        (("run", "--role", "serve"), 4),
        (("run", "--role", "learn"), 4),
        (("broker",), 3),
        (("model", "fetch"), 4),
    ],
)
def test_a_data_folder_that_cannot_be_written_is_named(
    arguments: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    """One line with the setting to change, before anything is waited for."""
    (tmp_path / "file").write_text("")
    flags = ("--set", "store.folder=file/data", "--set", "kafka.connect_timeout_s=0")
    done = run(*arguments, *flags, folder=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert "file/data" in done.stderr
    assert "store.folder" in done.stderr


def test_an_unreachable_broker_ends_with_code_3(tmp_path: Path) -> None:
    """After the time that is configured, with what to do."""
    flags = ("--bootstrap", "127.0.0.1:1", "--set", "kafka.connect_timeout_s=0")
    done = run("topics", "list", *flags, folder=tmp_path)
    assert done.returncode == 3
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_score_without_a_daemon_says_what_to_start(tmp_path: Path) -> None:
    """The failed question ends with 1 and the command that would help."""
    done = run("score", "hello", folder=tmp_path)
    assert done.returncode == 1
    assert "dylora-stream run" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("samples", "stats"), ("experts", "retire", "e-1", "--yes")], ids=" ".join
)
def test_a_data_folder_without_a_database_is_no_empty_one(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Asked in the wrong folder, a command says so, and makes no database there."""
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 4
    assert f"there is no database in {tmp_path / '.dylora'}" in done.stderr
    assert not (tmp_path / ".dylora").exists()


def test_settings_are_shown_with_their_origin(tmp_path: Path) -> None:
    """config show --changed lists what is set, and by whom."""
    (tmp_path / "dylora.toml").write_text("[pool]\nslots = 5\n")
    done = run("config", "show", "--changed", "--set", "http.port=0", folder=tmp_path)
    rows = [re.split(r"\s*│\s*", line)[1:4] for line in done.stdout.splitlines() if "│" in line]
    assert rows == [["pool.slots", "5", "file dylora.toml"], ["http.port", "0", "flag"]], done.stderr


def test_a_value_is_shown_whole_and_as_it_is(tmp_path: Path) -> None:
    """However long it is, where another program reads it; what looks like markup is part of it."""
    servers = ",".join(f"broker-{number}.a-long-name.example.com:9092" for number in range(9))
    flags = ("--set", f"kafka.bootstrap_servers={servers}", "--set", "store.experts=s3://bucket/[prod]/x")
    done = run("config", "show", "--changed", *flags, folder=tmp_path)
    rows = [re.split(r"\s*│\s*", line)[2] for line in done.stdout.splitlines() if "│" in line]
    assert rows == [servers, "s3://bucket/[prod]/x"], done.stderr


def test_on_a_terminal_a_long_value_goes_on_in_the_next_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it is left out."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    table = Table("position", "why")
    table.add_row("acme.production.requests:3:1234567890", "[/b] is no tag")
    show(table)
    rows = [re.split(r"\s*│\s*", line)[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "".join(row[0] for row in rows) == "acme.production.requests:3:1234567890"
    assert "".join(row[1] for row in rows).replace(" ", "") == "[/b]isnotag"


def test_the_doctor_fails_with_advice_where_there_is_nothing(tmp_path: Path) -> None:
    """On an empty machine: no broker, no model; every failed row says what to do."""
    done = run("doctor", "--bootstrap", "127.0.0.1:1", "--set", "http.port=0", folder=tmp_path, COLUMNS="200")
    assert done.returncode == 1
    assert "dylora-stream broker" in done.stdout
    assert "dylora-stream model fetch" in done.stdout
    assert "Traceback" not in done.stderr


@contextmanager
def listening_broker(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`dylora-stream broker` in a process, once it listens."""
    from dylora_stream.stream.broker import free_port

    command = [sys.executable, "-m", "dylora_stream", "broker", "--port", str(free_port(2))]
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.kafka
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_broker_and_its_server(number: int, code: int, tmp_path: Path) -> None:
    """The person's own signal is no error, and the server does not outlive the command."""
    from dylora_stream.stream.broker import glibc_problem

    if (problem := glibc_problem()) is not None:
        pytest.skip(problem)
    with listening_broker(tmp_path) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        server = json.loads((tmp_path / ".dylora" / "broker" / "broker.json").read_text())["pid"]
        assert "Kafka on 127.0.0.1:" in line
        process.send_signal(number)
        assert process.wait(20) == code
        assert not psutil.pid_exists(server)


def registry(*names: str) -> Registry:
    """A registry of experts with these ids."""
    return Registry(
        experts=tuple(
            ExpertVersion(
                expert_id=name,
                skill_id=name,
                version=1,
                parent=None,
                storage=StoredFolder(path="p", sha256="s"),
                maturity=Maturity.NASCENT,
            )
            for name in names
        )
    )


def test_an_expert_is_found_by_the_beginning_of_its_id() -> None:
    """Exact ids win; what fits several, or none, is answered with the choice."""
    known = registry("alpha", "alpha-2", "beta")
    assert known.named("b").expert_id == "beta"
    assert known.named("alpha").expert_id == "alpha"
    with pytest.raises(DyloraError, match="alpha, alpha-2"):
        known.named("alph")
    with pytest.raises(DyloraError, match="no expert is called 'x'"):
        known.named("x")
    with pytest.raises(DyloraError, match="none yet"):
        registry().named("x")
