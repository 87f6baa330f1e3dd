"""The learn loop on in-memory ports: every sample once, every message once, over aborts and restarts."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import structlog
from learning import (
    CLUSTERING,
    CODEC,
    NOVELTY,
    REFERENCE,
    REQUESTS,
    RULES,
    SPACE,
    features_of,
    sample,
    sketch_of,
    texts,
)
from safetensors.numpy import save_file

from dylora_stream.core.errors import (
    BrokerUnreachable,
    ExpertCorrupt,
    ExpertUnknown,
    ModelMismatch,
    OffsetsLost,
    TransactionAborted,
)
from dylora_stream.core.events import EventType
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry
from dylora_stream.core.ledger import Changes, JobKind, JobRecord, JobState, RowState
from dylora_stream.core.messages import OutboundMessage, Position, Sample, Topic
from dylora_stream.core.ports import Checkpoint
from dylora_stream.core.recipes import CONSOLIDATION, SEEDING
from dylora_stream.core.statistics import ExpertStatistics
from dylora_stream.learn.curator import Curator, CuratorConfig
from dylora_stream.learn.knowledge import Knowledge
from dylora_stream.learn.retirement import retirement
from dylora_stream.learn.service import LearnConfig, LearnFolders, LearnPorts, LearnService
from dylora_stream.learn.training import Training
from dylora_stream.stream import codec
from dylora_stream.testing import (
    ManualClock,
    MemoryBroker,
    MemoryChangelog,
    MemoryExpertStore,
    MemoryIndex,
    MemoryLedger,
    MemorySink,
    MemorySource,
    ScriptedChild,
)

GROUP = "dylora.learn"
TRAINING = Training(
    seeding=SEEDING,
    consolidation=CONSOLIDATION,
    check={"margin": 0.0},
    backbone="digest",
    feature_space=SPACE,
    prompt_template="{input}",
    rank=4,
)


class CountingMetrics:
    """Remembers what the loop told it."""

    def __init__(self) -> None:
        self.events: Counter[EventType] = Counter()
        self.jobs: list[tuple[str, str]] = []
        self.sampled_rows = self.aborts = 0
        self.on_poll: Callable[[], None] = lambda: None

    def polled(self, lag_records: Callable[[], float]) -> None:
        """See LearnMetrics."""
        lag_records()
        self.on_poll()

    def sampled(self, samples: Sequence[Sample]) -> None:
        """See LearnMetrics."""
        self.sampled_rows += len(samples)

    def job_ended(self, kind: str, outcome: str) -> None:
        """See LearnMetrics."""
        self.jobs.append((kind, outcome))

    def aborted(self) -> None:
        """See LearnMetrics."""
        self.aborts += 1

    def happened(self, kind: EventType) -> None:
        """See LearnMetrics."""
        self.events[kind] += 1


class SilentSink(MemorySink):
    """Publishes, and then says that it did not: a commit that ran into its time-out."""

    is_silent = True

    def publish(self, messages: Sequence[OutboundMessage], checkpoint: Checkpoint | None = None) -> None:
        """See the port."""
        super().publish(messages, checkpoint)
        if self.is_silent:
            self.is_silent = False
            raise TransactionAborted("no answer in time")


class SlowSource(MemorySource):
    """Does not get the committed notes from its broker three times, once the group has one."""

    slow_answers = 3

    def committed_notes(self) -> frozenset[str]:
        """See the port."""
        notes = super().committed_notes()
        if notes and self.slow_answers:
            self.slow_answers -= 1
            raise BrokerUnreachable("no answer in time")
        return notes


class DyingChild(ScriptedChild):
    """Takes a job and says nothing of it, as one whose process is killed."""

    def updates(self) -> list[Any]:
        """See the port."""
        return []


class Workshop:
    """A learn service on a broker and a ledger that outlive it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, ManualClock()
        self.broker, self.ledger, self.store = MemoryBroker(), MemoryLedger(), MemoryExpertStore()
        self.metrics = CountingMetrics()
        self.submitted: list[str] = []
        self.is_able = True
        self.start_from: Literal["earliest", "latest"] | None = None
        self.start()

    def start(
        self,
        sink: type[MemorySink] = MemorySink,
        child: type[ScriptedChild] = ScriptedChild,
        source: type[MemorySource] = MemorySource,
    ) -> None:
        """A new process on what the last one left."""
        topics = (Topic.SAMPLES, Topic.FEEDBACK)
        self.source = source(
            self.broker,
            topics,
            group=GROUP,
            own=self.ledger,
            start_from=self.start_from,
        )
        self.sink = sink(self.broker, "dylora.learn.0")
        ports = LearnPorts(
            source=self.source,
            sink=self.sink,
            experts=MemoryChangelog(self.broker),
            ledger=self.ledger,
            child=child(self.work),
            store=self.store,
            codec=CODEC,
            clock=self.clock,
            metrics=self.metrics,
        )
        knowledge = Knowledge(self._statistics, MemoryIndex, NOVELTY)
        rules = CuratorConfig(lifecycle=RULES, clustering=CLUSTERING)
        curator = Curator(self.ledger.load(RULES.expert_texts), knowledge, CODEC, self.clock, rules)
        folders = LearnFolders(
            jobs=self.folder / "jobs",
            reference=self.folder / "reference.safetensors",
            feedback_topic=self.broker.name(Topic.FEEDBACK),
        )
        self.service = LearnService(ports, curator, LearnConfig(batch_records=16), TRAINING, folders)
        self.service.recover()

    def send(self, inputs: Sequence[str], begin: int = 0) -> None:
        """Samples, as serve writes them."""
        for offset, text in enumerate(inputs, start=begin):
            message = CODEC.encode_sample(sample(text, offset, timestamp_ms=self.clock.now_ms()))
            self.broker.append(
                message.topic, message.value, message.key, message.headers, self.clock.now_ms()
            )

    def make_topics_anew(self) -> None:
        """As after the broker's data were deleted."""
        for log in self.broker.logs.values():
            log.clear()
        self.broker.groups.clear()

    def feed_back(self, offset: int, output: str) -> None:
        """A late answer."""
        answer = {"position": str(Position("dylora.requests", 0, offset)), "output": output}
        now_ms = self.clock.now_ms()
        self.broker.append(Topic.FEEDBACK, json.dumps(answer).encode(), b"k", timestamp_ms=now_ms)

    def steps(self, count: int) -> None:
        """Rounds of the loop, a second each."""
        for _ in range(count):
            self.clock.advance(1.0)
            self.service.step()

    def work(self, job: Path) -> Path:
        """What the child does with a job folder: sketches by the rows' texts, and every expert is good."""
        self.submitted.append(job.name)
        if not self.is_able:
            raise RuntimeError("no memory left")
        description = json.loads((job / "job.json").read_text())
        inputs = [json.loads(line)["input"] for line in (job / "rows.jsonl").read_text().splitlines()]
        result = job / "result"
        (result / "expert").mkdir(parents=True, exist_ok=True)
        if description["kind"] == JobKind.SKETCH:
            save_file(asdict(REFERENCE), description["reference"])
            save_file(
                {"sketches": np.stack([sketch_of(text) for text in inputs])}, result / "sketches.safetensors"
            )
            return result
        (result / "expert" / "rows.json").write_text(json.dumps(inputs))
        (result / "report.json").write_text(json.dumps({"decision": "promoted", "heldout": {"rows": 6}}))
        return result

    def _statistics(self, version: ExpertVersion) -> ExpertStatistics:
        inputs = json.loads((self.store.open(version.storage) / "rows.json").read_text())
        return ExpertStatistics(
            expert_id=version.expert_id, rows=np.stack([features_of(text) for text in inputs])
        )

    def events(self, kind: EventType | None = None) -> list[Any]:
        """The lifecycle events that are on the broker."""
        found = [codec.decode_event(record) for record in self.broker.records(Topic.EVENTS)]
        return [event for event in found if kind in (None, event.type)]

    def registries(self) -> list[list[str]]:
        """The experts of every registry record, in order."""
        records = [each for each in self.broker.records(Topic.EXPERTS) if each.key == codec.REGISTRY_KEY]
        return [[version.expert_id for version in codec.decode_registry(each).experts] for each in records]

    def published(self) -> list[tuple[object, ...]]:
        """Every message on the broker that learn sent."""
        return [
            (topic, record.key, record.value, record.headers)
            for topic in (Topic.EVENTS, Topic.EXPERTS)
            for record in self.broker.records(topic)
        ]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A learn service with nothing to learn yet."""
    return Workshop(tmp_path)


INPUTS = texts("apple", 0, RULES.rows_to_seed)
STEPS = 14  # from these inputs to a live expert, with rounds to spare


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The same stream, with nothing going wrong."""
    workshop = Workshop(tmp_path_factory.mktemp("undisturbed"))
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    return workshop


def test_feedback_that_cannot_be_read_is_passed_over(workshop: Workshop) -> None:
    """What users write never stops the loop: the record is taken, and the samples beside it are learned from."""
    position = f"{REQUESTS}:0:{'9' * 5000}"
    for value in (json.dumps({"output": "x", "position": position}).encode(), b"{", None):
        workshop.broker.append(Topic.FEEDBACK, value, b"k")
    workshop.send(INPUTS)
    workshop.steps(3)
    assert len(workshop.ledger.load().rows) == len(INPUTS)
    assert workshop.ledger.positions()[workshop.broker.name(Topic.FEEDBACK), 0] == 3


def kinds_of(workshop: Workshop) -> Counter[str]:
    """Events on the broker by type."""
    return Counter(event.type for event in workshop.events())


def test_samples_become_an_expert(undisturbed: Workshop) -> None:
    """From the topic to the registry: rows, sketches, buffer, seed job, and the registry record last."""
    registry = codec.decode_registry(undisturbed.broker.records(Topic.EXPERTS)[-1])
    assert len(registry.experts) == 1
    assert (registry.feature_space, registry.backbone) == (SPACE, "digest")
    expert = registry.experts[0].expert_id
    assert sorted(row.input for row in undisturbed.ledger.training_rows(expert, 1)) == sorted(INPUTS)
    spawned = undisturbed.events(EventType.EXPERT_SPAWNED)
    assert [event.entity for event in spawned] == [expert]
    assert registry.experts[0].skill_id == undisturbed.ledger.load().clusters[0].skill_id
    assert undisturbed.ledger.outbox() == []


@pytest.mark.parametrize("point", range(STEPS))
def test_an_abort_at_any_point_loses_and_repeats_nothing(
    tmp_path: Path, undisturbed: Workshop, point: int
) -> None:
    """Whichever round's transaction fails, each sample is one row and each event is sent once."""
    workshop = Workshop(tmp_path)
    workshop.send(INPUTS)
    workshop.steps(point)
    workshop.sink.fail_next()
    workshop.steps(STEPS + 3 - point)
    assert Counter(row.input for row in workshop.ledger.load().rows) == Counter(INPUTS)
    assert kinds_of(workshop) == kinds_of(undisturbed)
    assert len({event.id for event in workshop.events()}) == len(workshop.events())
    assert workshop.metrics.sampled_rows == len(INPUTS)
    assert workshop.ledger.outbox() == []


@pytest.mark.parametrize("point", range(STEPS))
def test_a_restart_at_any_point_loses_and_repeats_nothing(
    tmp_path: Path, undisturbed: Workshop, point: int
) -> None:
    """A new process on the same ledger and broker goes on; a job that was under way is done once."""
    workshop = Workshop(tmp_path)
    workshop.send(INPUTS)
    workshop.steps(point)
    workshop.start()
    workshop.steps(STEPS + 3 - point)
    assert Counter(row.input for row in workshop.ledger.load().rows) == Counter(INPUTS)
    assert kinds_of(workshop) == kinds_of(undisturbed)
    assert len(workshop.broker.records(Topic.EXPERTS)) == 2


def test_the_outbox_is_published_once_though_nobody_noted_it(tmp_path: Path, undisturbed: Workshop) -> None:
    """The process dies after Kafka's commit and before its own: the number beside the offsets tells the next one."""

    class ForgetfulLedger(MemoryLedger):
        """Dies before it can note what was published."""

        is_alive = True

        def published(self, mark: str) -> None:
            """See the port."""
            if not self.is_alive:
                raise SystemExit
            super().published(mark)

    workshop = Workshop(tmp_path)
    workshop.ledger = ForgetfulLedger()
    workshop.start()
    workshop.send(INPUTS)
    for _ in range(STEPS):
        workshop.ledger.is_alive = False
        try:
            workshop.steps(1)
        except SystemExit:
            workshop.ledger.is_alive = True
            workshop.start()
        workshop.ledger.is_alive = True
    workshop.steps(3)
    assert kinds_of(workshop) == kinds_of(undisturbed)
    assert len(workshop.broker.records(Topic.EXPERTS)) == 2


def test_positions_of_a_topic_that_is_gone_do_not_hold_up_the_outbox(workshop: Workshop) -> None:
    """The database keeps those of another prefix; a broker that is asked to commit them never answers."""
    workshop.ledger.commit(Changes(positions={("old.samples", 0): 5}))
    workshop.start()
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    workshop.service.retire(workshop.registries()[-1][0])
    workshop.steps(2)
    assert workshop.registries()[-1] == []
    assert ("old.samples", 0) not in workshop.broker.group(GROUP).committed


def test_a_commit_that_happened_without_an_answer_is_not_sent_again(
    tmp_path: Path, undisturbed: Workshop
) -> None:
    """The sink says aborted, the broker has it: the note beside the offsets is believed."""
    workshop = Workshop(tmp_path)
    workshop.start(sink=SilentSink)
    workshop.send(INPUTS)
    workshop.steps(STEPS + 1)
    assert workshop.metrics.aborts == 1
    assert kinds_of(workshop) == kinds_of(undisturbed)


def test_what_a_lost_ledger_noted_says_nothing_of_the_new_ones_outbox(workshop: Workshop) -> None:
    """Far more had been published before it was lost; a crash before Kafka's commit still loses no message."""
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    assert workshop.source.committed_notes()
    workshop.ledger = MemoryLedger()
    workshop.start()
    workshop.sink.fail_next(SystemExit())
    with pytest.raises(SystemExit):
        workshop.steps(STEPS)
    pending = [message for _, message in workshop.ledger.outbox()]
    assert pending
    workshop.start()
    assert [message for _, message in workshop.ledger.outbox()] == pending


@pytest.mark.parametrize("point", range(0, 9, 2))
def test_a_lost_ledger_withdraws_no_expert(tmp_path: Path, point: int) -> None:
    """The experts stay in service from its first round on, also over a crash; their rows come back to them."""
    workshop = Workshop(tmp_path)
    for begin, kind in enumerate(("apple", "bolt")):
        workshop.send(texts(kind, 0, 30), 30 * begin)
        workshop.steps(STEPS)
    (before,) = workshop.registries()[-1:]
    assert len(before) == 2
    workshop.ledger = MemoryLedger()
    workshop.start()
    assert [version.expert_id for version in workshop.ledger.load().registry.experts] == before
    workshop.steps(point)
    workshop.start()
    workshop.send(texts("cloud", 0, 30), 60)
    workshop.steps(2 * STEPS)
    assert all(set(before) <= set(names) for names in workshop.registries()[1:])
    assert len(workshop.registries()[-1]) == 3
    owners = {row.input.split()[0]: row.expert_id for row in workshop.ledger.load().rows}
    assert [owners["apple"], owners["bolt"]] == before


def test_a_topic_made_anew_hears_of_the_experts_again(workshop: Workshop) -> None:
    """Manifests first, then the registry, once."""
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    before = [record.value for record in workshop.broker.records(Topic.EXPERTS)]
    workshop.broker.logs[workshop.broker.name(Topic.EXPERTS), 0].clear()
    workshop.start()
    workshop.steps(3)
    assert [record.value for record in workshop.broker.records(Topic.EXPERTS)] == before


def test_experts_of_another_learn_stay_in_service(workshop: Workshop) -> None:
    """It publishes without having read of ours, and later retires one of its own; ours is never missed for long."""
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    (ours,) = workshop.ledger.load().registry.experts
    folder = workshop.folder / "theirs"
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(texts("bolt", 0, 30)))
    theirs = replace(ours, expert_id="theirs", storage=workshop.store.put(folder))
    both = workshop.ledger.load().registry.with_expert(theirs)
    for message in (CODEC.encode_manifest(theirs), CODEC.encode_registry(replace(both, experts=(theirs,)))):
        workshop.broker.append(message.topic, message.value, message.key)
    workshop.steps(2)
    assert set(workshop.registries()[-1]) == {ours.expert_id, "theirs"}
    workshop.steps(2)
    assert len(workshop.registries()) == 3
    retired = replace(theirs, maturity=Maturity.RETIRED)
    for message in (CODEC.encode_manifest(retired), CODEC.encode_registry(replace(both, experts=(ours,)))):
        workshop.broker.append(message.topic, message.value, message.key)
    workshop.steps(1)
    assert workshop.ledger.load().registry.experts == (ours,)
    assert len(workshop.registries()) == 4


def test_rows_of_an_expert_that_was_retired_elsewhere_are_put_aside(workshop: Workshop) -> None:
    """As where it is retired here."""
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    registry = workshop.ledger.load().registry
    (expert,) = registry.experts
    retired = replace(expert, maturity=Maturity.RETIRED)
    for message in (
        CODEC.encode_manifest(retired),
        CODEC.encode_registry(registry.without(expert.expert_id)),
    ):
        workshop.broker.append(message.topic, message.value, message.key)
    workshop.steps(1)
    assert workshop.ledger.load().registry.experts == ()
    assert {row.state for row in workshop.ledger.load().rows} == {RowState.SETTLED}


def test_an_adopted_expert_without_its_files_can_be_retired(workshop: Workshop) -> None:
    """Learn says that they are gone and ends; its database has the name by then, for `experts retire`."""
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    workshop.ledger, workshop.store = MemoryLedger(), MemoryExpertStore()
    with pytest.raises(ExpertCorrupt):
        workshop.start()
    registry = workshop.ledger.load().registry
    workshop.ledger.commit(retirement(registry.experts[0], registry, [], CODEC, 0))
    workshop.start()
    workshop.steps(1)
    assert workshop.registries()[-1] == []


def test_experts_of_another_backbone_are_not_taken_over(workshop: Workshop) -> None:
    """Nor withdrawn: learn ends with what to do, as serve does."""
    foreign = CODEC.encode_registry(replace(Registry(), feature_space="older", backbone="digest"))
    workshop.broker.append(foreign.topic, foreign.value, foreign.key)
    with pytest.raises(ModelMismatch, match="set model.name"):
        workshop.start()
    assert len(workshop.broker.records(Topic.EXPERTS)) == 1


@pytest.mark.parametrize("inputs", [INPUTS[:5], INPUTS])
def test_a_database_of_another_model_is_not_gone_on_with(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, inputs: Sequence[str]
) -> None:
    """Rows of two feature spaces cannot be compared, and experts of another backbone must not reach topics that have
    none: with rows alone or with an expert, also on topics of another prefix, learn ends with what to do."""
    workshop.send(inputs)
    workshop.steps(STEPS)
    other = replace(TRAINING, backbone="other", feature_space="other")
    monkeypatch.setattr(sys.modules[__name__], "TRAINING", other)
    workshop.broker = MemoryBroker()
    with pytest.raises(ModelMismatch, match=r"set model.name.* another store.folder"):
        workshop.start()
    assert not workshop.broker.records(Topic.EXPERTS)


def test_a_database_without_rows_is_any_models(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start with the wrong model leaves nothing behind."""
    monkeypatch.setattr(sys.modules[__name__], "TRAINING", replace(TRAINING, feature_space="other"))
    workshop.start()
    assert workshop.ledger.load().registry.feature_space == "other"


def test_an_outbox_in_doubt_waits_until_the_broker_says_what_it_has(
    tmp_path: Path, undisturbed: Workshop
) -> None:
    """The broker is slow after the abort too: nothing is sent on a guess, and the process goes on."""
    workshop = Workshop(tmp_path)
    workshop.start(sink=SilentSink, source=SlowSource)
    workshop.send(INPUTS)
    workshop.steps(STEPS + 6)
    assert isinstance(workshop.source, SlowSource)
    assert workshop.source.slow_answers == 0
    assert workshop.metrics.aborts == 1
    assert kinds_of(workshop) == kinds_of(undisturbed)
    assert workshop.ledger.outbox() == []


def test_rows_below_the_ledgers_positions_are_skipped(workshop: Workshop) -> None:
    """A new owner reads from the group's offset, which may lie behind; what DuckDB has is not taken again."""
    workshop.send(INPUTS[:5])
    workshop.steps(1)
    before = workshop.ledger.load().rows
    behind = MemorySource(workshop.broker, (Topic.SAMPLES, Topic.FEEDBACK), group="another")
    batch = behind.poll(100, 0)
    assert len(batch.records) == 5
    workshop.service._take(batch.records, batch.checkpoint)
    assert workshop.ledger.load().rows == before
    assert workshop.metrics.sampled_rows == 5


def test_topics_made_anew_stop_learn_until_it_is_told_where_to_start(workshop: Workshop) -> None:
    """It does not wait for offsets that come some day, and skips nothing unasked."""
    workshop.send(INPUTS[:20])
    workshop.steps(3)
    workshop.make_topics_anew()
    workshop.start()
    workshop.send(texts("bolt", 0, 10))
    with pytest.raises(OffsetsLost, match="start_from"):
        workshop.steps(1)


@pytest.mark.parametrize("point", range(4))
@pytest.mark.parametrize("goes_wrong", ["abort", "restart"])
def test_samples_of_topics_made_anew_are_taken_once_and_old_rows_stay(
    tmp_path: Path, point: int, goes_wrong: str
) -> None:
    """Their positions are those of old rows: also of those that an expert was trained on. Whatever goes wrong."""
    workshop = Workshop(tmp_path)
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    before = workshop.ledger.load()
    (expert,) = (version.expert_id for version in before.registry.experts)
    workshop.make_topics_anew()
    workshop.start_from = "earliest"
    workshop.start()
    workshop.send(texts("bolt", 0, len(INPUTS)))
    workshop.steps(point)
    if goes_wrong == "abort":
        workshop.sink.fail_next()
    else:
        workshop.start()
    workshop.steps(2 * STEPS)
    rows = workshop.ledger.load().rows
    assert Counter(row.input for row in rows) == Counter([*INPUTS, *texts("bolt", 0, len(INPUTS))])
    assert {row.position: row.input for row in before.rows}.items() <= {
        r.position: r.input for r in rows
    }.items()
    assert sorted(row.input for row in workshop.ledger.training_rows(expert, 1)) == sorted(INPUTS)
    assert workshop.ledger.load().era == 1
    assert expert in workshop.registries()[-1]
    assert len(workshop.registries()[-1]) == 2


def test_a_late_answer_after_topics_were_made_anew_is_for_the_new_record(workshop: Workshop) -> None:
    """The old row of the same position stays without one; who is told of an answer reads the position that he knows."""
    old = CODEC.encode_sample(sample("apple 0", 0, output=None))
    workshop.broker.append(old.topic, old.value, old.key, old.headers)
    workshop.send(INPUTS[1:5], 1)
    workshop.steps(1)
    workshop.make_topics_anew()
    workshop.start_from = "earliest"
    workshop.start()
    workshop.feed_back(0, "new")
    new = CODEC.encode_sample(sample("bolt 0", 0, output=None))
    workshop.broker.append(new.topic, new.value, new.key, new.headers)
    workshop.steps(1)
    assert {row.input: row.output for row in workshop.ledger.load().rows if row.input.endswith(" 0")} == {
        "apple 0": None, "bolt 0": "new",
    }  # fmt: skip
    workshop.feed_back(3, "for nobody")
    workshop.send(["bolt 9"], 9)
    workshop.steps(1)
    (event,) = workshop.events(EventType.FEEDBACK_UNMATCHED)
    assert event.entity == "dylora.requests:0:3"


def test_a_requests_topic_that_was_made_anew_alone_is_noticed(workshop: Workshop) -> None:
    """Another record stands at the position of a row: from there on the positions are new ones, also over a restart."""
    workshop.send(INPUTS[:10])
    workshop.send(INPUTS[:5])
    workshop.steps(2)
    assert workshop.ledger.load().era == 0
    workshop.send(texts("bolt", 3, 8), 3)
    workshop.steps(1)
    workshop.start()
    workshop.send(texts("bolt", 8, 10), 8)
    workshop.steps(1)
    state = workshop.ledger.load()
    assert state.era == 1
    assert Counter(row.input for row in state.rows) == Counter([*INPUTS[:10], *texts("bolt", 3, 10)])


def test_feedback_made_anew_alone_begins_no_era(workshop: Workshop) -> None:
    """Positions of requests mean what they meant."""
    workshop.send(INPUTS[:5])
    workshop.feed_back(99, "x")
    workshop.steps(1)
    workshop.broker.logs[workshop.broker.name(Topic.FEEDBACK), 0].clear()
    workshop.start_from = "earliest"
    workshop.start()
    workshop.steps(1)
    workshop.feed_back(98, "y")
    workshop.steps(1)
    assert {late.output for late in workshop.ledger.load().answers} == {"x", "y"}
    assert workshop.ledger.load().era == 0


def test_samples_of_another_feature_space_are_left_aside(workshop: Workshop) -> None:
    """Their features mean something else; the position moves on."""
    foreign = CODEC.encode_sample(sample("apple 1", 0, feature_space="older"))
    workshop.broker.append(foreign.topic, foreign.value, foreign.key, foreign.headers)
    workshop.broker.append(Topic.SAMPLES, b"no sample", foreign.key)
    workshop.steps(1)
    assert workshop.ledger.load().rows == ()
    assert workshop.ledger.positions()[workshop.broker.name(Topic.SAMPLES), 0] == 2


def test_feedback_labels_a_row(workshop: Workshop) -> None:
    """It comes over its own topic, in the same transaction as everything else."""
    message = CODEC.encode_sample(sample("apple 1", 0, output=None))
    workshop.broker.append(message.topic, message.value, message.key, message.headers)
    workshop.steps(1)
    answer = {"position": str(Position("dylora.requests", 0, 0)), "output": "APPLE 1"}
    workshop.broker.append(Topic.FEEDBACK, json.dumps(answer).encode(), b"k")
    workshop.steps(1)
    row = workshop.ledger.load().rows[0]
    assert (row.output, row.state) == ("APPLE 1", RowState.WAITING)


@pytest.mark.parametrize("point", range(8))
@pytest.mark.parametrize("goes_wrong", ["abort", "restart"])
def test_feedback_that_is_read_ahead_of_its_samples_is_not_lost(
    workshop: Workshop, point: int, goes_wrong: str
) -> None:
    """A backlog of both, all feedback first, whatever goes wrong on the way: each answer is there once."""
    for offset in range(40):
        answer = {"position": str(Position("dylora.requests", 0, offset)), "output": f"right {offset}"}
        workshop.broker.append(
            Topic.FEEDBACK, json.dumps(answer).encode(), b"k", timestamp_ms=workshop.clock.now_ms()
        )
        message = CODEC.encode_sample(
            sample(f"apple {offset}", offset, output=None, timestamp_ms=workshop.clock.now_ms())
        )
        workshop.broker.append(message.topic, message.value, message.key, message.headers)
    workshop.source._partitions.reverse()
    workshop.steps(point)
    if goes_wrong == "abort":
        workshop.sink.fail_next()
    else:
        workshop.start()
        workshop.source._partitions.reverse()
    workshop.steps(8)
    rows = workshop.ledger.load().rows
    assert [row.output for row in sorted(rows, key=lambda row: int(row.input.split()[1]))] == [
        f"right {offset}" for offset in range(40)
    ]
    assert not workshop.events(EventType.FEEDBACK_UNMATCHED)
    assert workshop.ledger.load().answers == ()


def test_feedback_labels_a_row_that_lies_in_the_ledger_alone(workshop: Workshop) -> None:
    """Held no more because so many came after it: it is fetched, and waits for an expert."""
    message = CODEC.encode_sample(sample("apple 1", 0, output=None))
    workshop.broker.append(message.topic, message.value, message.key, message.headers)
    workshop.steps(1)
    (row,) = workshop.ledger.load().rows
    workshop.service._curator._buffers.rows.drop(row.position)
    answer = {"position": row.position, "output": "APPLE 1"}
    workshop.broker.append(Topic.FEEDBACK, json.dumps(answer).encode(), b"k")
    workshop.steps(1)
    (row,) = workshop.ledger.load().rows
    assert (row.output, row.state) == ("APPLE 1", RowState.WAITING)


def test_a_running_job_is_taken_up_again_after_a_restart(workshop: Workshop) -> None:
    """The child died with its process; the same folder is given to the next one."""
    workshop.start(child=DyingChild)
    workshop.send(INPUTS[:12])
    workshop.steps(2)
    running = workshop.ledger.load().jobs
    assert [job.kind for job in running] == [JobKind.SKETCH]
    workshop.start()
    workshop.steps(3)
    assert workshop.submitted[:2] == [running[0].job_id] * 2
    assert workshop.ledger.load().jobs == ()
    assert {row.state for row in workshop.ledger.load().rows} == {RowState.CLUSTERED}


def test_a_jobs_folder_goes_with_its_end(undisturbed: Workshop) -> None:
    """Sketches, trainings: nothing of the stream stays in files, and the expert can be read all the same."""
    assert list((undisturbed.folder / "jobs").iterdir()) == []
    (version,) = undisturbed.ledger.load().registry.experts
    assert (undisturbed.store.open(version.storage) / "rows.json").exists()


def test_a_failed_jobs_folder_goes_as_well(workshop: Workshop) -> None:
    """Its reason is in the log and in the ledger."""
    workshop.is_able = False
    workshop.send(INPUTS)
    workshop.steps(5)
    assert len(workshop.submitted) >= 1
    assert list((workshop.folder / "jobs").iterdir()) == []


def test_folders_that_a_killed_process_left_go_at_the_next_start(workshop: Workshop) -> None:
    """Of a job whose end was committed, and one half written; the running job's stays, and is done."""
    workshop.start(child=DyingChild)
    workshop.send(INPUTS[:12])
    workshop.steps(2)
    (running,) = workshop.ledger.load().jobs
    jobs = workshop.folder / "jobs"
    for left in ("0123456789abcdef", ".fedcba9876543210"):
        (jobs / left / "result").mkdir(parents=True)
        (jobs / left / "rows.jsonl").write_text("what a record said")
    workshop.start()
    assert [folder.name for folder in jobs.iterdir()] == [running.job_id]
    workshop.steps(3)
    assert list(jobs.iterdir()) == []
    assert {row.state for row in workshop.ledger.load().rows} == {RowState.CLUSTERED}


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        (JobKind.SKETCH, "result/sketches.safetensors", b""),
        (JobKind.SKETCH, "result/sketches.safetensors", None),
        (JobKind.SKETCH, "../../reference.safetensors", b""),
        (JobKind.SEED, "result/report.json", b""),
        (JobKind.SEED, "result/report.json", b"{}"),
        (JobKind.SEED, "result/report.json", b"[]"),
    ],
)
def test_a_damaged_result_is_thrown_away_and_the_job_done_anew(
    workshop: Workshop, kind: JobKind, name: str, content: bytes | None
) -> None:
    """A power cut left an empty file: learn goes on, says that the job failed, and has its expert in the end."""

    class DamagedOnce(ScriptedChild):
        """Its first result of the kind is not what was written."""

        is_whole = False

        def submit(self, folder: Path) -> None:
            """See the port."""
            super().submit(folder)
            if not DamagedOnce.is_whole and json.loads((folder / "job.json").read_text())["kind"] == kind:
                DamagedOnce.is_whole = True
                path = folder / name
                path.unlink() if content is None else path.write_bytes(content)

    workshop.start(child=DamagedOnce)
    workshop.send(INPUTS)
    workshop.steps(2 * STEPS)
    (failed,) = workshop.events(EventType.TRAINING_FAILED)
    assert "cannot be read" in failed.data["error"]
    assert len(workshop.events(EventType.EXPERT_SPAWNED)) == 1


def test_a_damaged_reference_is_written_anew(workshop: Workshop) -> None:
    """Found at a start: no more than the next sketch job is needed."""
    workshop.send(INPUTS[:12])
    workshop.steps(4)
    reference = workshop.folder / "reference.safetensors"
    whole = reference.read_bytes()
    reference.write_bytes(b"")
    workshop.start()
    assert not reference.exists()
    workshop.send(INPUTS[12:], begin=12)
    workshop.steps(STEPS)
    assert reference.read_bytes() == whole
    assert workshop.events(EventType.TRAINING_FAILED) == []
    assert len(workshop.events(EventType.EXPERT_SPAWNED)) == 1


def test_a_running_job_without_its_folder_has_failed(workshop: Workshop) -> None:
    """Somebody deleted it: `training.failed` says so, and the rows are not lost."""
    workshop.start(child=DyingChild)
    workshop.send(INPUTS[:12])
    workshop.steps(2)
    shutil.rmtree(workshop.folder / "jobs")
    workshop.start()
    workshop.steps(2)
    assert "folder is gone" in workshop.events(EventType.TRAINING_FAILED)[0].data["error"]
    workshop.steps(10)
    assert {row.state for row in workshop.ledger.load().rows} == {RowState.CLUSTERED}


def test_a_retired_expert_leaves_with_the_next_round(workshop: Workshop) -> None:
    """Asked for by the beginning of its id, from any thread; manifest, registry and event are published."""
    workshop.send(INPUTS)
    workshop.steps(STEPS)
    (expert,) = workshop.ledger.load().registry.experts
    with pytest.raises(ExpertUnknown, match=expert.expert_id):
        workshop.service.retire("nobody")
    workshop.service.retire(expert.expert_id[:4])
    workshop.steps(1)
    manifest, registry = workshop.broker.records(Topic.EXPERTS)[-2:]
    assert codec.decode_manifest(manifest) == replace(expert, maturity=Maturity.RETIRED)
    assert codec.decode_registry(registry).experts == ()
    assert [event.entity for event in workshop.events(EventType.EXPERT_RETIRED)] == [expert.expert_id]


def test_a_new_version_of_a_retired_expert_is_not_taken(workshop: Workshop) -> None:
    """Its training was under way: it failed, and the expert does not come back."""
    job = JobRecord(
        job_id="j", kind=JobKind.CONSOLIDATE, tenant="default", created_ms=0, positions=(), expert_id="gone"
    )
    changes = workshop.service._finish(job, workshop.folder)
    assert (changes.jobs["j"].state, changes.registry) == (JobState.FAILED, None)
    assert workshop.metrics.jobs == [("consolidate", "failed")]


def test_a_childs_error_is_an_event_and_backs_off(workshop: Workshop) -> None:
    """A failed sketch job waits before it is tried again, and the stream goes on."""
    workshop.is_able = False
    workshop.send(INPUTS)
    workshop.steps(5)
    failed = workshop.events(EventType.TRAINING_FAILED)
    assert [event.data["error"] for event in failed] == ["no memory left"]
    assert workshop.metrics.jobs == [("sketch", "failed")]
    workshop.is_able = True
    workshop.steps(STEPS)
    assert len(workshop.events(EventType.EXPERT_SPAWNED)) == 1


class Choking(Workshop):
    """Its child dies of one row."""

    def work(self, job: Path) -> Path:
        """See Workshop."""
        if "POISON" in (job / "rows.jsonl").read_text():
            self.submitted.append(job.name)
            raise RuntimeError("the child process ended with code -9")
        return super().work(job)


def test_a_row_that_kills_the_child_is_given_up_and_told(tmp_path: Path) -> None:
    """The oldest of all: the others become an expert within minutes."""
    workshop = Choking(tmp_path)
    poison = sample("apple 999", 0, output="POISON", timestamp_ms=workshop.clock.now_ms())
    message = CODEC.encode_sample(poison)
    workshop.broker.append(message.topic, message.value, message.key, message.headers)
    workshop.send(INPUTS, begin=1)
    with structlog.testing.capture_logs() as logs:
        workshop.steps(180)
    settled = [row for row in workshop.ledger.load().rows if row.state is RowState.SETTLED]
    assert [row.output for row in settled] == ["POISON"]
    assert [line["position"] for line in logs if line["event"] == "row_given_up"] == [settled[0].position]
    assert len(workshop.events(EventType.EXPERT_SPAWNED)) == 1


def test_draining_ends_the_loop_after_the_round_at_hand(workshop: Workshop) -> None:
    """`run` returns, with what it took committed and published."""
    workshop.send(INPUTS[:3])
    workshop.clock.advance(RULES.sketch_after_s)
    workshop.metrics.on_poll = workshop.service.drain
    workshop.service.run()
    assert not workshop.service.is_ready
    assert len(workshop.ledger.load().rows) == 3
    assert workshop.ledger.outbox() == []
