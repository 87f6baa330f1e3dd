"""The serve loop on an in-memory broker: a registry is prepared beside the batches, and swapped between two of them."""

import json
import threading
import time
from collections.abc import Callable, Sequence

from dylora_stream.core.errors import TransactionAborted
from dylora_stream.core.events import EventType
from dylora_stream.core.experts import Registry
from dylora_stream.core.messages import Answer, OutboundMessage, Request, Topic
from dylora_stream.core.ports import Activation, Checkpoint, LoadFailure
from dylora_stream.ops.metrics import Metrics
from dylora_stream.serve.pipeline import Pipeline, PipelineConfig
from dylora_stream.serve.service import FIRST_RETRY_S, ServeConfig, ServePorts, ServeService, Worker
from dylora_stream.stream.codec import REGISTRY_KEY, decode_event
from dylora_stream.stream.wire import WireCodec
from dylora_stream.testing import ManualClock, MemoryJournal, UniformAnswerer
from dylora_stream.testing.stream import MemoryBroker, MemoryChangelog, MemorySink, MemorySource

DEADLINE_S = 20.0  # of what another thread does at once


class PatientAnswerer(UniformAnswerer):
    """Prepares a registry when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may_prepare, self.has_prepared = threading.Event(), threading.Event()

    def prepare(self, registry: Registry) -> Activation:
        """Waits for the word."""
        assert self.may_prepare.wait(DEADLINE_S)
        activation = super().prepare(registry)
        self.has_prepared.set()
        return activation


class HinderedAnswerer(UniformAnswerer):
    """Cannot load these parts of any registry, until they are taken off its list."""

    def __init__(self, *failures: LoadFailure) -> None:
        super().__init__()
        self.failures = list(failures)
        self.attempts = 0

    def prepare(self, registry: Registry) -> Activation:
        """See the port."""
        activation, failed = super().prepare(registry), tuple(self.failures)
        self.attempts += 1
        return lambda: (*activation(), *failed)


class SlowAnswerer(UniformAnswerer):
    """Takes so long for each record; counts what it is given."""

    def __init__(self, clock: ManualClock, record_s: float) -> None:
        super().__init__()
        self.clock, self.record_s = clock, record_s
        self.batches: list[int] = []

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See the port."""
        self.clock.advance(self.record_s * len(requests))
        self.batches.append(len(requests))
        return super().answer(requests)


class ImpatientSink(MemorySink):
    """Refuses what was polled longer ago than the group allows, as Kafka does."""

    def __init__(self, broker: MemoryBroker, clock: ManualClock, patience_s: float) -> None:
        super().__init__(broker)
        self._clock, self._patience_s, self._began_s = clock, patience_s, clock.monotonic_s()

    def publish(self, messages: Sequence[OutboundMessage], checkpoint: Checkpoint | None = None) -> None:
        """See the port."""
        began_s, self._began_s = self._began_s, self._clock.monotonic_s()
        if self._began_s - began_s > self._patience_s:
            raise TransactionAborted("the group has moved on")
        super().publish(messages, checkpoint)


def service_of(
    broker: MemoryBroker,
    answerer: UniformAnswerer,
    clock: ManualClock | None = None,
    sink: MemorySink | None = None,
) -> ServeService:
    """A serve loop on a broker."""
    codec, clock = WireCodec(source="/test"), clock or ManualClock()
    ports = ServePorts(
        source=MemorySource(broker, [Topic.REQUESTS]),
        sink=sink or MemorySink(broker),
        changelog=MemoryChangelog(broker),
        answerer=answerer,
        codec=codec,
        clock=clock,
        metrics=Metrics(clock),
        journal=MemoryJournal(),
    )
    worker = Worker(model="tiny", feature_space="space", boot="1")
    return ServeService(ports, Pipeline(answerer, codec, clock, PipelineConfig()), ServeConfig(), worker)


def publish_registry(broker: MemoryBroker) -> None:
    """One more registry on its topic."""
    message: OutboundMessage = WireCodec(source="/test").encode_registry(Registry())
    broker.append(Topic.EXPERTS, message.value, message.key, message.headers)


def registries_of(broker: MemoryBroker) -> list[int]:
    """The registry's number of each result, in order."""
    return [json.loads(record.value or b"")["registry"] for record in broker.records(Topic.RESULTS)]


def test_records_are_answered_while_a_registry_is_prepared() -> None:
    """An expert that joins never stalls the stream: batches go on under the old registry until the new one is ready."""
    broker, answerer = MemoryBroker(), PatientAnswerer()
    service = service_of(broker, answerer)
    before = service.registry.number
    publish_registry(broker)
    for number in range(3):
        broker.append(Topic.REQUESTS, f"text {number}".encode())
        assert service.step() == 1
    assert registries_of(broker) == [before] * 3
    answerer.may_prepare.set()
    assert answerer.has_prepared.wait(DEADLINE_S)
    while service.registry.number == before:  # the thread's result is a moment behind its last word
        service.step()
    broker.append(Topic.REQUESTS, b"text 3")
    assert service.step() == 1
    assert registries_of(broker) == [before] * 3 + [0]
    assert answerer.registry.number == 0


def test_registries_that_came_meanwhile_are_passed_over_for_the_newest() -> None:
    """One is prepared at a time; the next one is the newest there is."""
    broker, answerer = MemoryBroker(), PatientAnswerer()
    service = service_of(broker, answerer)
    for _ in range(3):
        publish_registry(broker)
        service.step()
    answerer.may_prepare.set()
    while service.registry.number < 2:
        service.step()
    assert answerer.registry.number == 2


def test_a_registry_that_cannot_be_read_is_passed_over() -> None:
    """It stays in the topic for as long as nothing replaces it: every worker that starts would end at it."""
    broker = MemoryBroker()
    service = service_of(broker, UniformAnswerer())
    publish_registry(broker)
    broker.append(Topic.EXPERTS, b'{"experts": "of a later release"}', REGISTRY_KEY)
    steps_until(service, lambda: service.registry.number == 0)
    publish_registry(broker)
    steps_until(service, lambda: service.registry.number == 2)


UNREACHABLE = LoadFailure(name="sums/2", reason="the store is not reachable", may_pass=True)
UNFIT = LoadFailure(name="dates/1", reason="made for another backbone", may_pass=False)


def steps_until(service: ServeService, is_done: Callable[[], bool]) -> None:
    """Rounds of the loop until another thread has done its part."""
    end_s = time.monotonic() + DEADLINE_S
    while not is_done():
        assert time.monotonic() < end_s
        service.step()


def load_failures(broker: MemoryBroker) -> list[tuple[str, object]]:
    """Entity and reason of each `expert.load_failed` on the broker."""
    events = [decode_event(record) for record in broker.records(Topic.EVENTS)]
    assert len({event.id for event in events}) == len(events)
    return [
        (event.entity, event.data["reason"]) for event in events if event.type == EventType.EXPERT_LOAD_FAILED
    ]


def test_what_could_not_be_loaded_is_told_with_its_reason_and_tried_again_until_it_is_there() -> None:
    """A store that is away for a while costs that while, and not all the time until the next registry."""
    broker, clock, answerer = MemoryBroker(), ManualClock(), HinderedAnswerer(UNREACHABLE, UNFIT)
    service = service_of(broker, answerer, clock)
    publish_registry(broker)
    steps_until(service, lambda: service.registry.number == 0)
    told = [(failure.name, failure.reason) for failure in (UNREACHABLE, UNFIT)]
    assert load_failures(broker) == told
    shown = service._ports.metrics.text().decode()
    assert "dylora_experts_not_loaded 2.0" in shown
    assert f'dylora_events_total{{type="{EventType.EXPERT_LOAD_FAILED}"}} 2.0' in shown

    def tries_again_after(wait_s: float, attempts: int) -> None:
        clock.advance(wait_s - 1)
        service.step()
        assert answerer.attempts == attempts - 1
        clock.advance(1)
        steps_until(service, lambda: answerer.attempts == attempts and service._progress.preparing is None)

    tries_again_after(FIRST_RETRY_S, 2)
    tries_again_after(2 * FIRST_RETRY_S, 3)
    assert load_failures(broker) == told
    answerer.failures = [UNFIT]
    clock.advance(4 * FIRST_RETRY_S)
    steps_until(service, lambda: service._progress.retry_at_s is None)
    clock.advance(1000)
    service.step()
    assert answerer.attempts == 4


def test_a_registry_that_no_longer_names_a_version_ends_its_retries() -> None:
    """What is tried again is always the newest registry; its own failures are told anew."""
    broker, clock, answerer = MemoryBroker(), ManualClock(), HinderedAnswerer(UNREACHABLE)
    service = service_of(broker, answerer, clock)
    publish_registry(broker)
    steps_until(service, lambda: service.registry.number == 0)
    publish_registry(broker)
    steps_until(service, lambda: service.registry.number == 1)
    assert load_failures(broker) == [(UNREACHABLE.name, UNREACHABLE.reason)] * 2
    answerer.failures = []
    publish_registry(broker)
    steps_until(service, lambda: service.registry.number == 2)
    clock.advance(1000)
    service.step()
    assert answerer.attempts == 3


def test_batches_that_outlive_their_place_in_the_group_become_smaller_until_they_do_not() -> None:
    """A model of ten seconds a record would answer the same 64 records for ever; a fast one gets all of them again."""
    broker, clock = MemoryBroker(), ManualClock()
    answerer = SlowAnswerer(clock, record_s=11.0)
    service = service_of(broker, answerer, clock, ImpatientSink(broker, clock, patience_s=600.0))
    for number in range(200):
        broker.append(Topic.REQUESTS, f"text {number}".encode())
    for _ in range(6):
        service.step()
    assert answerer.batches == [64, 32, 16, 8, 4, 4]
    assert len(broker.records(Topic.RESULTS)) == 32 + 16 + 8 + 4 + 4
    answerer.record_s = 0.01
    for _ in range(6):
        service.step()
    assert answerer.batches[6:] == [4, 8, 16, 32, 64, 12]
    assert len(broker.records(Topic.RESULTS)) == 200
