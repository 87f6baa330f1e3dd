"""The daemon's learn loop on in-memory ports, in lockstep: a batch of records, then all jobs that it makes worth doing.

Broker, ledger and clock are in memory; curator, clusters, novelty, job folders and decisions are the daemon's own.
Training, where it is asked for, is the daemon's child's: a job that is done already is taken as it is, so that a run
that was stopped goes on where it was.

Records are answered before anything is learned of them. An expert, trained or not, stands for one that has its rows by
heart: what it knows it answers as the most alike of them was to be answered, so that it is right and wrong as an expert
is; what no expert knows gets no answer.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dylora_stream.bench.continual.workbench import Tell
from dylora_stream.bench.novelty.child import Finished, StreamChild, Train, by_heart
from dylora_stream.bench.novelty.script import Script
from dylora_stream.bootstrap.parts import expert_store, router_parts, settings_within
from dylora_stream.bootstrap.services import learn_service
from dylora_stream.core.durable import put_in_place
from dylora_stream.core.events import EventType
from dylora_stream.core.ledger import Changes, LedgerRow, RowState
from dylora_stream.core.messages import (
    DEFAULT_TENANT,
    Novelty,
    Policy,
    Position,
    Sample,
    SampleReason,
    Topic,
)
from dylora_stream.learn.service import LearnPorts
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import feature_space
from dylora_stream.model.jobs import run_job
from dylora_stream.model.reference import write_reference
from dylora_stream.model.trial import Workshop
from dylora_stream.settings import Settings
from dylora_stream.stream.wire import WireCodec
from dylora_stream.testing import (
    ManualClock,
    MemoryBroker,
    MemoryChangelog,
    MemoryLedger,
    MemorySink,
    MemorySource,
)

__all__ = ["Played", "play", "trainer"]

BATCH = 8  # records of a poll
TOPIC = "stream"
SNAPSHOTS = 4  # of who has which record, for the picture


@dataclass(frozen=True, kw_only=True)
class Played:
    """What became of a script's records. `finished`: jobs, each with the number of records taken until then."""

    owners: tuple[str | None, ...]
    """The expert that has each record at the end."""
    was_known: tuple[bool, ...]
    """Whether an expert knew it when it was first asked about with all that was known of it."""
    finished: tuple[tuple[int, Finished], ...]
    experts: tuple[str, ...]
    """Live at the end."""
    numbers: dict[str, int]
    """The number of each record by its position."""
    snapshots: tuple[tuple[str | None, ...], ...]
    """The expert of each record so far, at `SNAPSHOTS` even moments."""


class WatchedLedger(MemoryLedger):
    """Keeps every row's last state within reach, and the first that says whose it is or that it is nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, RowState] = {}
        self.last: dict[str, LedgerRow] = {}

    def commit(self, changes: Changes) -> None:
        """See the port."""
        super().commit(changes)
        for position, row in changes.rows.items():
            self.last[position] = row
            if row.state is not RowState.WAITING:
                self.first.setdefault(position, row.state)


class Quiet:
    """`LearnMetrics` that nobody reads."""

    def polled(self, lag_records: Callable[[], float]) -> None:
        """See LearnMetrics."""

    def sampled(self, samples: Sequence[Sample]) -> None:
        """See LearnMetrics."""

    def job_ended(self, kind: str, outcome: str) -> None:
        """See LearnMetrics."""

    def aborted(self) -> None:
        """See LearnMetrics."""

    def happened(self, kind: EventType) -> None:
        """See LearnMetrics."""


class StreamLearner:
    """Takes a script's records. `folder` holds jobs, experts, and what similarities are measured against."""

    def __init__(
        self, settings: Settings, backbone: Backbone, script: Script, folder: Path, train: Train | None
    ) -> None:
        self._script = script
        self._space, self._width = feature_space(backbone), backbone.width
        self._clock, self._broker, self.ledger = ManualClock(), MemoryBroker(), WatchedLedger()
        self._codec = WireCodec(source="/dylora/bench")
        self.child = StreamChild(script.rows, settings.check, backbone.width, train)
        folder.mkdir(parents=True, exist_ok=True)
        here = settings_within(settings, folder)
        here = here.model_copy(update={"learn": replace(here.learn, threads=torch.get_num_threads())})
        write_reference(backbone, folder / f"reference-{self._space}.safetensors")
        topics = (Topic.SAMPLES, Topic.FEEDBACK)
        ports = LearnPorts(
            source=MemorySource(self._broker, topics, group="learn", own=self.ledger),
            sink=MemorySink(self._broker, "learn"),
            experts=MemoryChangelog(self._broker),
            ledger=self.ledger,
            child=self.child,
            store=expert_store(here),
            codec=self._codec,
            clock=self._clock,
            metrics=Quiet(),
        )
        self._loop = learn_service(here, ports, self._broker.name(Topic.FEEDBACK))
        self._loop.service.recover()

    @property
    def experts(self) -> tuple[str, ...]:
        """Those that live."""
        return tuple(version.expert_id for version in self._loop.curator.registry.experts)

    def feed(self, numbers: Sequence[int]) -> None:
        """These records of the script, and every job that they are reason for."""
        for number, answered in zip(numbers, self._answered(numbers), strict=True):
            elapsed_ms = int(self._script.times_ms[number] - self._script.times_ms[max(number - 1, 0)])
            self._clock.advance(elapsed_ms / 1000)
            message = self._codec.encode_sample(self._sample(number, *answered))
            self._broker.append(
                message.topic, message.value, message.key, message.headers, self._clock.now_ms()
            )
        submitted = -1
        while submitted != self.child.submitted or not self.child.is_idle:
            submitted = self.child.submitted
            self._loop.service.step()

    def owners(self, count: int) -> tuple[str | None, ...]:
        """The expert that has each of the first `count` records; None: nobody."""
        rows = [self.ledger.last[str(Position(TOPIC, 0, number))] for number in range(count)]
        return tuple(row.expert_id if row.state is RowState.ASSIGNED else None for row in rows)

    def _answered(self, numbers: Sequence[int]) -> list[tuple[str | None, str]]:
        """The expert that knows each record, and its answer; None and nothing where the backbone had to answer."""
        asked = self._script.rows.take(self._script.lines[list(numbers)])
        answered: list[tuple[str | None, str]] = []
        for match, features in zip(
            self._loop.knowledge.match(DEFAULT_TENANT, asked.features), asked.features, strict=True
        ):
            if match.nearest is None or not self._loop.knowledge.is_known(match):
                answered.append((None, ""))
                continue
            taught = self.child.taught[match.nearest]
            answered.append((match.nearest, by_heart(taught, features, self._width)))
        return answered

    def _sample(self, number: int, expert: str | None, answer: str) -> Sample:
        """A labelled record: every one teaches."""
        line = int(self._script.lines[number])
        text = self._script.rows.texts[line]
        return Sample(
            position=Position(TOPIC, 0, number),
            id=None,
            tenant=DEFAULT_TENANT,
            input=text.input,
            output=text.output,
            choices=(),
            reason=SampleReason.NOVEL if expert is None else SampleReason.TEACHING,
            timestamp_ms=self._clock.now_ms(),
            answer=answer,
            policy=Policy.BACKBONE if expert is None else Policy.SPARSE,
            expert=expert,
            version=0 if expert is None else 1,
            novelty=Novelty(score=0.0, p_value=None, entropy=0.0, nearest=expert, is_novel=expert is None),
            feature_space=self._space,
            features=self._script.rows.features[line],
        )


def play(learner: StreamLearner, script: Script, tell: Tell) -> Played:
    """The whole script."""
    finished: list[tuple[int, Finished]] = []
    snapshots: list[tuple[str | None, ...]] = []
    for start in range(0, len(script), BATCH):
        tell(f"stream: {len(learner.experts)} experts", start, len(script))
        end = min(start + BATCH, len(script))
        learner.feed(range(start, end))
        finished += [(end, job) for job in learner.child.finished[len(finished) :]]
        if end * SNAPSHOTS >= (len(snapshots) + 1) * len(script):
            snapshots.append(learner.owners(end))
    positions = [str(Position(TOPIC, 0, number)) for number in range(len(script))]
    return Played(
        owners=learner.owners(len(script)),
        was_known=tuple(learner.ledger.first.get(position) is RowState.ASSIGNED for position in positions),
        finished=tuple(finished),
        experts=learner.experts,
        numbers={position: number for number, position in enumerate(positions)},
        snapshots=tuple(snapshots),
    )


def trainer(settings: Settings, backbone: Backbone, tell: Tell, kept: Path) -> Train:
    """Jobs done as the daemon's child does them, told about. Results are kept, so that a run goes on where it was."""

    def say(progress: dict[str, object]) -> None:
        tell(f"stream: {progress.get('stage')}", int(str(progress["step"])), int(str(progress["steps"])))

    workshop = Workshop(backbone=backbone, parts=router_parts(settings), routing=settings.router, say=say)

    def train(folder: Path) -> Path:
        result = kept / folder.name
        if not result.is_dir():
            aside = kept / f".{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(run_job(folder, workshop), aside)
            put_in_place(aside, result)
        return result

    return train
