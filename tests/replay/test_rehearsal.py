"""A stream through serve and learn in one process, without a broker: `StreamDriver`, and the command that plays a file.

A tiny model with random weights, which learns one word as the answer to everything.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from daemons import TINY, command
from models import tiny_llama
from rich.console import Console

from dylora_stream.bootstrap.driver import StreamDriver
from dylora_stream.core.errors import SettingsError
from dylora_stream.demo.rehearsal import RehearsalConfig, rehearse
from dylora_stream.ops.files import FileRecord
from dylora_stream.settings import Settings, load_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LEARNING = [
    "lifecycle.rows_to_seed=24",
    "lifecycle.max_seed_rows=24",
    "seeding.rate=0.02",
    "seeding.epochs=8",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of these tests: a model, and 60 requests of one kind with their answer among which one is no request."""
    home = tmp_path_factory.mktemp("rehearsal")
    tiny_llama(home / "model")
    rows = [{"input": f"ticket {n} of day {n * 7 % 31}", "output": "yes"} for n in range(60)]
    lines = [json.dumps(row) for row in (*rows[:40], {"input": 7}, *rows[40:])]
    (home / "requests.jsonl").write_text("\n".join(lines) + "\n")
    return home


@pytest.fixture(scope="module")
def flags(home: Path) -> list[str]:
    """A daemon that learns from 24 rows; its own store must stay as it is."""
    return [*TINY, *LEARNING, f"model.folder={home / 'model'}", f"store.folder={home / 'own'}"]


@pytest.fixture
def settings(flags: list[str]) -> Settings:
    """From the flags."""
    return load_settings(flags=flags)


@pytest.fixture(scope="module")
def told(home: Path, flags: list[str]) -> dict[str, Any]:
    """The report of the command."""
    assignments = [word for flag in flags for word in ("--set", flag)]
    done = command(
        "rehearse", "requests.jsonl", "--batch", "8", "--keep", "kept", "--report", "report.json", *assignments,
        folder=home, patience_s=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a new expert" in done.stdout
    report: dict[str, Any] = json.loads((home / "report.json").read_text())
    return report


def test_a_file_teaches_an_expert_that_answers_the_rest_of_it(told: dict[str, Any], home: Path) -> None:
    """Each record ends once, and the expert is right more often than the backbone was."""
    assert told["records"]["sent"] == 61
    assert (told["records"]["answered"], told["records"]["dead-lettered"]) == (60, 1)
    assert told["experts"]["spawned"] == 1
    backbone, expert = told["answerers"]
    assert backbone["name"] == "backbone"
    assert expert["since"] > 24
    assert expert["records"] >= 10
    assert expert["accuracy"] > backbone["accuracy"] == 0
    assert list((home / "kept" / "experts").rglob("*.safetensors"))
    assert not (home / "own").exists()


def test_it_can_be_repeated(told: dict[str, Any], settings: Settings, home: Path) -> None:
    """The same expert at the same record, with the same answers."""
    report = home / "again.json"
    config = RehearsalConfig(file=home / "requests.jsonl", batch=8, report=report)
    rehearse(config, settings, Console(quiet=True))
    assert json.loads(report.read_text()) == told


def test_what_is_played_comes_back_by_position(settings: Settings, tmp_path: Path) -> None:
    """Records without a time come a second apart; one that is no request is a dead letter."""
    with StreamDriver(settings, tmp_path / "run") as driver:
        first = driver.play([FileRecord(value=b'{"input": "a"}'), FileRecord(value=b"\xff\xfe")])
        second = driver.play([FileRecord(value=b'{"input": "b"}')])
    assert [result.position for result in first.results] == ["dylora.requests:0:0"]
    assert first.dead_letters == ["dylora.requests:0:1"]
    assert [result.position for result in second.results] == ["dylora.requests:0:2"]


def test_a_folder_that_holds_something_is_refused(settings: Settings, tmp_path: Path) -> None:
    """Nothing of another run is taken up or overwritten."""
    (tmp_path / "learn.duckdb").touch()
    with pytest.raises(SettingsError, match="is not empty"):
        StreamDriver(settings, tmp_path)
