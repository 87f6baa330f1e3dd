"""The whole daemon as its operator starts it: a subprocess with a data folder, asked over Kafka, HTTP and commands."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.error import URLError
from urllib.request import Request, urlopen

from dylora_stream import bootstrap
from dylora_stream.bootstrap.parts import kafka_of
from dylora_stream.core.messages import DeadLetter, Event, Topic
from dylora_stream.settings import Settings, load_settings
from dylora_stream.stream import codec
from dylora_stream.stream.broker import EmbeddedBroker
from dylora_stream.stream.changelog import KafkaChangelog

PATIENCE_S = 60.0  # a role imports torch, which takes ten seconds where others work too
ROLES = ("serve", "learn")
TINY = ["model.dtype=float32", "model.threads=1", "model.stem_layers=2", "model.max_input_tokens=200",
        "generation.max_new_tokens=4", "pool.slots=4", "serve.batch_records=4", "lifecycle.sketch_rows=8",
        "lifecycle.sketch_after_s=1", "lifecycle.rows_to_seed=1000", "lifecycle.max_seed_rows=1000",
        "topics.requests_partitions=2"]  # fmt: skip

Value = TypeVar("Value")


def until(look: Callable[[], Value], patience_s: float = PATIENCE_S) -> Value:
    """What `look` gives once it gives something; AssertionError when that takes too long. The one place that waits."""
    end_s = time.monotonic() + patience_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end_s, f"still nothing after {patience_s} s"
        time.sleep(0.1)


def environment(**changes: str) -> dict[str, str]:
    """The test's own variables without the settings', one thread a process, and the changes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DYLORA_")}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def command(*words: str, folder: Path, patience_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """A command of the program, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "dylora_stream", *words],
        cwd=folder, env=environment(COLUMNS="200"), capture_output=True, text=True, timeout=patience_s, check=False,
    )  # fmt: skip


class Daemon:
    """`dylora-stream run`, its log in a file beside its data. Leaving the block ends it."""

    def __init__(self, settings: Settings, *words: str) -> None:
        self.settings = settings
        self.data = settings.store.folder
        self.log = self.data.parent / "daemon.log"
        self._words = words

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dylora_stream", "run", *self._words, *self.settings.arguments],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment(),
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE_S)
            finally:
                self.process.kill()
                self.process.wait()

    def said(self) -> list[dict[str, Any]]:
        """The log's lines."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def pid(self, role: str) -> int:
        """The process of a role."""
        return int((self.data / f"{role}-0.pid").read_text())

    def wait_until_ready(self, patience_s: float = PATIENCE_S) -> None:
        """Until serve and learn both take records."""
        for role in ROLES:
            until(lambda role=role: self._is_ready(role), patience_s)  # type: ignore[misc]

    def kill(self, role: str) -> None:
        """SIGKILL to a role, in the middle of whatever it does; its supervisor starts it again."""
        os.kill(self.pid(role), signal.SIGKILL)

    def ask(self, path: str, question: object = None, role: str = "serve") -> tuple[int, str]:
        """Status and body of a role's port; 0 while nobody listens. A question is posted as JSON."""
        data = None if question is None else json.dumps(question).encode()
        try:
            address = (self.data / f"{role}.http").read_text()
            with urlopen(Request(address + path, data=data), timeout=10) as response:
                return response.status, response.read().decode()
        except (URLError, OSError) as error:
            return getattr(error, "code", 0), str(error)

    def stats(self) -> dict[str, Any]:
        """What learn holds; no rows while it does not answer."""
        status, body = self.ask("/stats", role="learn")
        stats: dict[str, Any] = json.loads(body) if status == 200 else {"rows": {}, "clusters": []}
        return stats

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command with this daemon's settings."""
        return command(*words, *self.settings.arguments, folder=self.data.parent)

    def _is_ready(self, role: str) -> bool:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-2000:]
        return self.ask("/readyz", role=role)[0] == 200


def settings_of(servers: str, folder: Path, model: Path, *flags: str) -> Settings:
    """Settings of a daemon with a prefix, a group and a data folder of its own."""
    prefix = f"e2e.{os.getpid()}.{folder.name}."
    own = {
        "kafka.bootstrap_servers": servers,
        "kafka.prefix": prefix,
        "kafka.group": f"{prefix}group",
        "store.folder": folder / "data",
        "model.folder": model,
        "http.port": 0,
    }
    return load_settings(flags=[*(f"{name}={value}" for name, value in own.items()), *flags])


@contextmanager
def embedded_settings(folder: Path, model: Path, *flags: str) -> Iterator[Settings]:
    """Settings of a daemon that has an embedded broker in its data folder."""
    with EmbeddedBroker(folder / "data" / "broker") as broker:
        yield settings_of(broker.bootstrap_servers, folder, model, *flags)


def count_fates(settings: Settings) -> Counter[str]:
    """How often each source position ended as a result or a dead letter, as a fresh reader counts."""
    return Counter(
        position
        for topic in (Topic.RESULTS, Topic.DEAD_LETTERS)
        for position in bootstrap.read_positions(settings, topic)
    )


def read_dead_letters(settings: Settings) -> list[DeadLetter]:
    """Every dead letter so far."""
    return [codec.decode_dead_letter(record) for record in _read(settings, Topic.DEAD_LETTERS)]


def read_events(settings: Settings) -> list[Event]:
    """Every event so far."""
    return [codec.decode_event(record) for record in _read(settings, Topic.EVENTS)]


def listen(
    traffic: bootstrap.Traffic,
    heard: bootstrap.Heard,
    is_enough: Callable[[bootstrap.Heard], object],
    patience_s: float = PATIENCE_S,
) -> None:
    """Add what comes back to `heard` until it is enough."""

    def listen_once() -> bool:
        more = traffic.poll(0.5)
        heard.results.extend(more.results)
        heard.events.extend(more.events)
        heard.registries.extend(more.registries)
        heard.dead_letters.extend(more.dead_letters)
        return bool(is_enough(heard))

    until(listen_once, patience_s)


def has_fate(heard: bootstrap.Heard, positions: Sequence[str]) -> bool:
    """Whether each of these positions has a result or a dead letter."""
    return set(positions) <= {*heard.dead_letters, *(result.position for result in heard.results)}


def _read(settings: Settings, topic: Topic) -> list[Any]:
    log = KafkaChangelog(kafka_of(settings, "look"), topic)
    try:
        return log.catch_up(PATIENCE_S)
    finally:
        log.close()
