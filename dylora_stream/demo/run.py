"""The demo from nothing to its table: broker, daemon, stream, a fresh reader's count, the backbone alone beside it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from rich.console import Console

from dylora_stream import bootstrap
from dylora_stream.core.errors import DyloraError, SettingsError
from dylora_stream.core.messages import Topic
from dylora_stream.demo.journal import Journal, Reply, Sent, Task
from dylora_stream.demo.player import Pace, Player
from dylora_stream.demo.report import SkillReport, judged, skill_reports, skills_table, totals_table
from dylora_stream.demo.skills import load_skills
from dylora_stream.demo.view import View
from dylora_stream.logs import LogConfig, configure_logs
from dylora_stream.settings import Settings, load_settings
from dylora_stream.store.identity import is_in_use

__all__ = ["DemoConfig", "demo", "emptied", "read_tasks"]

DAEMON_LOG, DATA = "daemon.log", "data"  # what a demo keeps in its folder

LONGEST_START_S = 120.0  # of the daemon, until serve says that it is there
LONGEST_END_S = 60.0
CHARS_A_TOKEN = 2.5  # of answers full of names, numbers and signs

LEAST_DEADLINE_S = 900.0
DEADLINE_S_PER_KIND = 280.0  # its rows at a trickle while its expert trains, on two cores


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What the command line says."""

    folder: Path = Path(".dylora/demo")  # emptied at each start
    data: Path | None = None  # a dataset folder instead of the built-in skills
    rows: int | None = None  # of each task
    kill_serve_at: int | None = None
    kill_learn_at: int | None = None
    report: Path | None = None
    deadline_s: float | None = None  # None: as many kinds need

    def deadline_for(self, kinds: int) -> float:
        """Seconds until no more records are sent."""
        return self.deadline_s or max(LEAST_DEADLINE_S, DEADLINE_S_PER_KIND * kinds)


def read_tasks(folder: Path, rows: int | None) -> list[Task]:
    """The tasks of a dataset folder: its NAME.train.jsonl files, in name order, rows in file order."""
    files = sorted(folder.glob("*.train.jsonl"))
    if not files:
        raise SettingsError(
            f"{folder} is no dataset folder: it has no NAME.train.jsonl (rows of input and output)"
        )
    return [Task(name=file.name.removesuffix(".train.jsonl"), rows=_pairs(file, rows)) for file in files]


def _pairs(file: Path, rows: int | None) -> tuple[tuple[str, str], ...]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    pairs = [_pair(line, f"{file}, line {number}") for number, line in numbered[:rows]]
    if not any(text.strip() for text, _ in pairs):
        raise SettingsError(f"{file} holds no row of input and output")
    return tuple((text, output) for text, output in pairs if text.strip())


def _pair(line: str, place: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        text, output = row["input"], row["output"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f'{place} is not {{"input": text, "output": text}}') from error
    if not isinstance(text, str) or not isinstance(output, str):
        raise SettingsError(f"{place}: input and output must be texts")
    return text, output


def emptied(folder: Path) -> None:
    """Make the folder, without what another demo left there. SettingsError, and nothing is removed, where it holds
    anything else, or another demo is under way.
    """
    try:
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if found and (DAEMON_LOG not in found or found - {DAEMON_LOG, DATA}):
            foreign = min(found - {DAEMON_LOG, DATA} or found)
            raise SettingsError(
                f"{folder} holds {foreign}, which no demo left there, and would be emptied: give --folder a new folder"
            )
        if is_in_use(folder / DATA):
            raise SettingsError(
                f"another demo is running in {folder}: wait for it, or give --folder a new folder"
            )
        for name in found:
            shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DAEMON_LOG).write_bytes(b"")
    except OSError as error:
        raise SettingsError(f"{folder} cannot be used ({error}): give --folder a new folder") from error


def demo(config: DemoConfig, console: Console) -> int:
    """Play it; the exit code: 0 when every record was answered once."""
    started_s = time.monotonic()
    configure_logs(LogConfig(level="error", libraries="error"), "demo")
    if config.data is None:
        tasks = [Task(name=skill.name, rows=skill.rows[: config.rows]) for skill in load_skills()]
    else:
        tasks = read_tasks(config.data, config.rows)
    emptied(config.folder)
    console.print(f"Data, logs and experts of this run: {config.folder}")
    bootstrap.fetch_model(load_settings(), console.print)
    journal = Journal()
    with bootstrap.demo_broker(config.folder / DATA / "broker") as servers:
        console.print(f"Broker: {servers}")
        settings = load_settings(flags=_overrides(config, servers, tasks))
        _play(config, settings, tasks, journal, console)
        count_again(settings, journal)
        trained = bootstrap.trained_rows(settings)
    before = _answer_alone(settings, tasks, journal, trained, console.print)
    reports = skill_reports(tasks, journal, trained, before)
    return _conclude(config, reports, journal, time.monotonic() - started_s, console)


def _play(
    config: DemoConfig, settings: Settings, tasks: Sequence[Task], journal: Journal, console: Console
) -> None:
    """The stream, from the daemon's start to its end."""
    bootstrap.create_topics(settings)
    view = View(console, tasks, journal)
    pace = Pace(
        kill_serve_at=config.kill_serve_at,
        kill_learn_at=config.kill_learn_at,
        deadline_s=config.deadline_for(len(tasks)),
    )
    with _Daemon(settings, config.folder) as daemon, bootstrap.Traffic(settings) as wire:
        traffic = _DemoTraffic(wire, journal, view, daemon)
        traffic.wait_until_served()
        with view.showing():
            Player(tasks, journal, traffic, bootstrap.SystemClock(), pace).play(view.tell)


def _conclude(
    config: DemoConfig, reports: Sequence[SkillReport], journal: Journal, wall_s: float, console: Console
) -> int:
    """Table and report; the exit code."""
    totals = journal.totals()
    experts = {
        "spawned": journal.events["expert.spawned"],
        "live": len(journal.live_at),
        "rejected": journal.events["expert.rejected"],
        "matured": journal.events["expert.matured"],
        "consolidated": journal.events["expert.promoted"],
    }
    console.print(
        skills_table(reports),
        totals_table("Records, counted by a fresh reader of the topics, by position", totals),
        totals_table("Experts", experts),
    )
    console.print(f"{wall_s:.0f} s in all")
    if config.report is not None:
        skills = [asdict(report) for report in reports]
        document = {"skills": skills, "records": totals, "experts": experts, "wall_s": round(wall_s, 1)}
        config.report.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"Report: {config.report}")
    return 0 if totals["lost"] == totals["repeated"] == 0 else 1


def _overrides(config: DemoConfig, servers: str, tasks: Sequence[Task]) -> list[str]:
    """Flags of the demo's daemon; everything else is the product's default."""
    lengths = sorted(len(output) for task in tasks for _, output in task.rows)
    # Not the longest: one monster must not make every answer of the bare backbone long.
    long = lengths[len(lengths) * 95 // 100]
    return [
        f"kafka.bootstrap_servers={servers}",
        f"store.folder={config.folder / DATA}",
        f"model.folder={bootstrap.model_path(load_settings())}",
        f"generation.max_new_tokens={round(long / CHARS_A_TOKEN) + 4}",
        "http.port=0",
    ]


class _Daemon:
    """`dylora-stream run` as an operator would start it, its log in a file; it ends with this process, however that
    ends."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._command = [sys.executable, "-m", "dylora_stream", "run", "--supervised", *settings.arguments]
        self._data = settings.store.folder
        self._log = folder / DAEMON_LOG

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(LONGEST_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """DyloraError with the log's last lines when it has ended."""
        if self._process.poll() is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise DyloraError(
                f"the daemon ended with code {self._process.returncode}; {self._log} says:\n{tail}"
            )

    def kill(self, role: str) -> None:
        """SIGKILL to a role's process; its supervisor starts it again."""
        os.kill(int((self._data / f"{role}-0.pid").read_text()), signal.SIGKILL)


class _DemoTraffic:
    """`player.Traffic` on the wire, writing the journal."""

    def __init__(self, wire: bootstrap.Traffic, journal: Journal, view: View, daemon: _Daemon) -> None:
        self._wire = wire
        self._journal = journal
        self._view = view
        self._daemon = daemon
        self._registries: dict[int, list[str]] = {}
        self._newest = -1

    def wait_until_served(self) -> None:
        """Until serve has said that it is there."""
        end_s = time.monotonic() + LONGEST_START_S
        while not self._journal.events["worker.started"]:
            if time.monotonic() > end_s:
                raise DyloraError("the daemon did not start in time; its log is beside its data")
            self.hear(0.2)

    def send(self, records: Sequence[tuple[str, str, str]]) -> None:
        """See the port."""
        positions = self._wire.send([{"input": text, "output": output} for _, text, output in records])
        for (task, text, output), position in zip(records, positions, strict=True):
            order = len(self._journal.sent)
            self._journal.sent[position] = Sent(
                task=task, input=text, output=output, position=position, order=order
            )

    def hear(self, timeout_s: float) -> None:
        """See the port."""
        self._daemon.check()
        heard = self._wire.poll(timeout_s)
        for registry in heard.registries:
            self._registries[registry.number] = [version.expert_id for version in registry.experts]
        for event in heard.events:
            self._journal.heard_event(event.type)
            self._view.tell_event(event.type, event.entity, dict(event.data))
        for result in heard.results:
            self._hear_result(result)
        for position in heard.dead_letters:
            self._journal.dead[position] += 1

    def _hear_result(self, result: bootstrap.ResultData) -> None:
        self._journal.counts[result.position] += 1
        reply = Reply(output=result.output, expert=result.expert, policy=result.policy, is_novel=result.novel)
        self._journal.replies.setdefault(result.position, reply)
        known = [number for number in self._registries if number <= result.registry]
        if known and result.registry > self._newest:
            self._newest = result.registry
            self._journal.heard_registry(self._registries[max(known)])

    def kill(self, role: str) -> None:
        """See the port."""
        self._view.tell(f"kill -9 {role}")
        self._daemon.kill(role)


def count_again(settings: Settings, journal: Journal) -> None:
    """Replace the journal's counts by those of a fresh reader of the whole topics."""
    journal.counts.clear()
    journal.dead.clear()
    for topic, counts in ((Topic.RESULTS, journal.counts), (Topic.DEAD_LETTERS, journal.dead)):
        counts.update(bootstrap.read_positions(settings, topic))


def _answer_alone(
    settings: Settings,
    tasks: Sequence[Task],
    journal: Journal,
    trained: Mapping[str, Sequence[str]],
    tell: Callable[[str], None],
) -> dict[str, bool]:
    """Position → whether the backbone alone is right, by the better of the raw and the chat prompt of each task."""
    tell("Measuring the backbone alone on the same records, raw and chat prompt ...")
    best: dict[str, bool] = {}
    answer = bootstrap.backbone_alone(settings)
    for task in tasks:
        records = judged(task, journal, trained)
        if not records:
            continue
        tries = []
        for answers in answer([record.input for record in records]):
            right = [
                given.strip() == record.output.strip() for given, record in zip(answers, records, strict=True)
            ]
            tries.append(right)
        chosen = max(tries, key=sum)
        best |= {record.position: right for record, right in zip(records, chosen, strict=True)}
    return best
