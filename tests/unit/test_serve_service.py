"""The serve loop on an in-memory broker: a registry is prepared beside the batches, and swapped between two of them."""

import json
import threading

from dylora_stream.core.experts import Registry
from dylora_stream.core.messages import OutboundMessage, Topic
from dylora_stream.core.ports import Activation
from dylora_stream.ops.metrics import Metrics
from dylora_stream.serve.pipeline import Pipeline, PipelineConfig
from dylora_stream.serve.service import ServeConfig, ServePorts, ServeService, Worker
from dylora_stream.stream.wire import WireCodec
from dylora_stream.testing import ManualClock, UniformAnswerer
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


def service_of(broker: MemoryBroker, answerer: UniformAnswerer) -> ServeService:
    """A serve loop on a broker."""
    codec, clock = WireCodec(source="/test"), ManualClock()
    ports = ServePorts(
        source=MemorySource(broker, [Topic.REQUESTS]),
        sink=MemorySink(broker),
        changelog=MemoryChangelog(broker),
        answerer=answerer,
        codec=codec,
        clock=clock,
        metrics=Metrics(clock),
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
