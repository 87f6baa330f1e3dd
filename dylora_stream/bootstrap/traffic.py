"""Clients of a running daemon: sending requests, reading what comes back, counting by position."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from kafka import KafkaProducer

from dylora_stream.bootstrap.parts import kafka_of, load_backbone, mixture_answerer, open_ledger
from dylora_stream.core.errors import BrokerError
from dylora_stream.core.experts import Registry
from dylora_stream.core.messages import Event, Position, RawRecord, Request, Topic
from dylora_stream.settings import Settings
from dylora_stream.stream import codec
from dylora_stream.stream.broker import ApacheKafka, EmbeddedBroker
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.kafka import client_options, connect, kafka_errors
from dylora_stream.stream.schemas import ResultData

__all__ = [
    "HEARD",
    "Heard",
    "ResultData",
    "Traffic",
    "backbone_alone",
    "demo_broker",
    "read_positions",
    "trained_rows",
]

READ_S = 60.0  # a whole topic, from its beginning
ALONE_BATCH = 64  # records of one call to the backbone alone


@contextmanager
def demo_broker(folder: Path) -> Iterator[str]:
    """The servers of a broker for one demo: Apache Kafka where KAFKA_HOME names it, the embedded one otherwise."""
    home = os.environ.get("KAFKA_HOME")
    with ApacheKafka(Path(home), folder) if home else EmbeddedBroker(folder) as broker:
        yield broker.bootstrap_servers


@dataclass(slots=True)
class Heard:
    """Results, events, registries, and the positions of dead letters."""

    results: list[ResultData] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    registries: list[Registry] = field(default_factory=list)
    dead_letters: list[str] = field(default_factory=list)

    def add(self, topic: Topic, record: RawRecord) -> None:
        """Sort in what stood on a topic."""
        match topic:
            case Topic.RESULTS:
                self.results.append(codec.decode_result(record))
            case Topic.EVENTS:
                self.events.append(codec.decode_event(record))
            case Topic.DEAD_LETTERS:
                self.dead_letters.append(_source_position(record))
            case Topic.EXPERTS if record.key == codec.REGISTRY_KEY:
                self.registries.append(codec.decode_registry(record))
            case _:
                pass


HEARD = (Topic.RESULTS, Topic.EVENTS, Topic.DEAD_LETTERS, Topic.EXPERTS)  # where all of it stands


class Traffic:
    """Requests in, and all that comes back, from now on."""

    def __init__(self, settings: Settings) -> None:
        kafka = kafka_of(settings, "traffic")
        self._topic = kafka.topic(Topic.REQUESTS)
        options = client_options(kafka, "traffic") | {
            "acks": "all",
            "max_request_size": kafka.max_message_bytes,
        }
        self._producer: Any = connect(lambda: KafkaProducer(**options), kafka)
        self._log = KafkaChangelog(kafka, *HEARD)
        self._topics = {kafka.topic(topic): topic for topic in HEARD}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._producer.close()
        self._log.close()

    def send(self, requests: Sequence[Mapping[str, Any]]) -> list[str]:
        """JSON requests; their positions, once the broker has them."""
        return self.send_raw([(None, json.dumps(request).encode(), ()) for request in requests])

    def send_raw(
        self, records: Sequence[tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes]]]]
    ) -> list[str]:
        """(key, value, headers) as they are."""
        with kafka_errors("sending requests"):
            futures = [
                self._producer.send(self._topic, key=key, value=value, headers=list(headers))
                for key, value, headers in records
            ]
            self._producer.flush()
            found = [future.get(timeout=READ_S) for future in futures]
        return [str(Position(self._topic, sent.partition, sent.offset)) for sent in found]

    def poll(self, timeout_s: float) -> Heard:
        """What came since the last call, sorted by what it is."""
        heard = Heard()
        for record in self._log.poll(timeout_s):
            heard.add(self._topics[record.position.topic], record)
        return heard


def read_positions(settings: Settings, topic: Topic) -> list[str]:
    """The source position of every record of `results` or `dead-letters`, read by a fresh reader from the beginning."""
    log = KafkaChangelog(kafka_of(settings, "count"), topic)
    try:
        return [_source_position(record) for record in log.catch_up(READ_S)]
    finally:
        log.close()


def _source_position(record: RawRecord) -> str:
    if any(name.startswith(codec.ERROR_HEADER) for name, _ in record.headers):
        return str(codec.decode_dead_letter(record).record.position)
    if record.value is None:
        raise BrokerError(f"{record.position} has no value: the topic was written by another program")
    return str(json.loads(record.value)["position"])


def trained_rows(settings: Settings) -> dict[str, list[str]]:
    """Expert id → positions of the rows that its first version was trained on. Only while learn is not running."""
    ledger = open_ledger(settings)
    try:
        experts = [version.expert_id for version in ledger.load().registry.experts]
        return {expert: [row.position for row in ledger.training_rows(expert, 1)] for expert in experts}
    finally:
        ledger.close()


def backbone_alone(settings: Settings) -> Callable[[Sequence[str]], Iterator[list[str]]]:
    """A function from inputs to their answers, once by the product's prompt, once by the model's chat prompt."""
    from dylora_stream.model.backbone import PromptTemplate

    raw = load_backbone(settings)
    chat = raw.tokenizer.apply_chat_template(
        [{"role": "user", "content": "{input}"}], tokenize=False, add_generation_prompt=True
    )

    def answers(inputs: Sequence[str]) -> Iterator[list[str]]:
        for backbone in (raw, replace(raw, template=PromptTemplate(chat))):
            alone = mixture_answerer(
                settings.model_copy(update={"pool": replace(settings.pool, slots=1)}), backbone
            )
            requests = [
                Request(position=Position("alone", 0, number), input=text)
                for number, text in enumerate(inputs)
            ]
            yield [
                answer.output
                for start in range(0, len(requests), ALONE_BATCH)
                for answer in alone.answer(requests[start : start + ALONE_BATCH])
            ]

    return answers
