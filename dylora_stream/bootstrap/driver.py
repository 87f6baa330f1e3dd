"""Serve and learn in one process on a broker in memory: how people try the daemon on their own stream.

Broker and clock are in memory; all else is the daemon's: codec, pipeline, backbone, pool, curator, DuckDB, the child
that trains. It goes in lockstep: a batch is answered, then learned from, and every job has ended before the next batch
is taken. So the same records, settings and thread counts give the same experts on one machine, however long training
takes.

Invariant: nothing leaves the folder it was given; the configured broker, database and expert store are not touched.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from dylora_stream.bootstrap.parts import (
    SystemClock,
    check_method,
    expert_store,
    load_backbone,
    mixture_answerer,
    open_ledger,
    settings_within,
)
from dylora_stream.bootstrap.services import child_process, learn_service, serve_service
from dylora_stream.bootstrap.traffic import HEARD, Heard
from dylora_stream.core.errors import SettingsError
from dylora_stream.core.messages import Topic
from dylora_stream.learn.service import LearnPorts, LearnService
from dylora_stream.ops.files import FileRecord
from dylora_stream.ops.metrics import Metrics
from dylora_stream.serve.service import ServePorts
from dylora_stream.settings import Settings
from dylora_stream.stream.wire import WireCodec
from dylora_stream.testing import (
    ManualClock,
    MemoryBroker,
    MemoryChangelog,
    MemoryJournal,
    MemorySink,
    MemorySource,
)

__all__ = ["StreamDriver"]

SOURCE = "/dylora/driver"  # of events
PACE_S = 1.0  # of record time between records without a time
CHILD_POLL_S = 0.01


class StreamDriver:
    """Plays records; a context manager.

        with StreamDriver(settings, folder) as driver:
            heard = driver.play(list(read_records(file, ReadOptions())))

    `folder` must be new or empty; database, jobs and experts are left in it. Raises SettingsError.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        check_method(settings)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SettingsError(f"{folder} is not empty: give a new folder, a run begins from nothing")
        here = settings_within(settings, folder)
        self._closing = ExitStack()
        self._clock, self._broker = ManualClock(), MemoryBroker()
        self._logs = {topic: MemoryChangelog(self._broker, topic) for topic in HEARD}
        self._last_ms: int | None = None
        backbone = load_backbone(here)
        answerer = mixture_answerer(here, backbone)
        self._closing.callback(answerer.close)
        self.child = child_process(here)
        self._closing.callback(self.child.close)
        codec = WireCodec(source=SOURCE)
        self._serve = serve_service(
            here,
            ServePorts(
                source=MemorySource(self._broker, [Topic.REQUESTS]),
                sink=MemorySink(self._broker),
                changelog=MemoryChangelog(self._broker),
                answerer=answerer,
                codec=codec,
                clock=self._clock,
                metrics=Metrics(SystemClock()),
                journal=MemoryJournal(),
            ),
            backbone,
        )
        self._learn = self._learning(here, codec)

    def _learning(self, here: Settings, codec: WireCodec) -> LearnService:
        ledger = open_ledger(here)
        self._closing.callback(ledger.close)
        ports = LearnPorts(
            source=MemorySource(self._broker, [Topic.SAMPLES, Topic.FEEDBACK], group="learn", own=ledger),
            sink=MemorySink(self._broker, "learn"),
            experts=MemoryChangelog(self._broker),
            ledger=ledger,
            child=self.child,
            store=expert_store(here),
            codec=codec,
            clock=self._clock,
            metrics=Metrics(SystemClock()),
        )
        service = learn_service(here, ports, self._broker.name(Topic.FEEDBACK)).service
        service.recover()
        return service

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def play(self, records: Sequence[FileRecord]) -> Heard:
        """Answer these records as one batch and learn from them; all that came of it.

        Record time follows the records' own; those without one come a second apart.
        """
        for record in records:
            now_ms = self._arrive(record.timestamp_ms)
            self._broker.append(Topic.REQUESTS, record.value, record.key, record.headers, now_ms)
        self._serve.take_newest()
        while self._serve.step():
            pass
        while self._learn.step() or not self.child.is_idle:
            if not self.child.is_idle:
                time.sleep(CHILD_POLL_S)
        heard = Heard()
        for topic, log in self._logs.items():
            for found in log.poll():
                heard.add(topic, found)
        return heard

    def _arrive(self, timestamp_ms: int | None) -> int:
        """The time of a record; the clock stands there now, and never goes back."""
        if timestamp_ms is None:
            self._clock.advance(PACE_S)
        else:
            elapsed_ms = 0 if self._last_ms is None else max(timestamp_ms - self._last_ms, 0)
            self._clock.advance(elapsed_ms / 1000)
            self._last_ms = max(timestamp_ms, self._last_ms or 0)
        return self._clock.now_ms()
