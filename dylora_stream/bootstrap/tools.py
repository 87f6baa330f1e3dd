"""What the operator's commands need: sending files, reading the registry, statistics, and the doctor's probes."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora_stream.bootstrap.parts import (
    SystemClock,
    broker_folder,
    expert_store,
    kafka_of,
    ledger_file,
    model_path,
    open_ledger,
)
from dylora_stream.core.errors import (
    BrokerError,
    DatabaseBusy,
    DyloraError,
    ModelNotFound,
    StoreError,
    TopicMissing,
)
from dylora_stream.core.experts import ExpertVersion, Registry
from dylora_stream.core.messages import Topic
from dylora_stream.learn.retirement import retirement
from dylora_stream.ops.ask import ask
from dylora_stream.ops.doctor import Probe, machine_probes
from dylora_stream.ops.files import FileRecord
from dylora_stream.settings import Settings
from dylora_stream.stream import codec
from dylora_stream.stream.broker import EmbeddedBroker, glibc_problem
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.kafka import KafkaConfig, client_options, connect, kafka_errors
from dylora_stream.stream.topics import TopicState, describe_topics, ensure_topics
from dylora_stream.stream.wire import WireCodec

if TYPE_CHECKING:
    from dylora_stream.store.database import DuckLedger

__all__ = [
    "doctor_probes", "embedded_broker", "expert_folder", "newest_registry", "retire", "sample_stats", "score",
    "sender", "topic_states",
]  # fmt: skip

READ_S = 30.0  # the experts topic, from its beginning
DOCTOR_CONNECT_S = 3.0  # a doctor who waits a minute for a broker is no help
LOOPBACK = ("127.0.0.1", "localhost", "::1")
UNACKNOWLEDGED = 500  # records on their way before their fate is looked at
CODECS = {"snappy": "snappy", "lz4": "lz4", "zstd": "zstandard"}  # Kafka's name -> module that reads it


@contextmanager
def sender(settings: Settings) -> Iterator[Callable[[FileRecord], None]]:
    """Sends records to the requests topic. Leaving the block waits for the broker; BrokerError when one was refused.

    The topic is made first where it is missing: a broker that makes it for the first record gives it one partition,
    which one serve worker has for itself for ever.
    """
    from kafka import KafkaProducer

    ensure_topics(settings.kafka, settings.topics, Topic.REQUESTS)
    kafka = kafka_of(settings, "produce")
    topic = kafka.topic(Topic.REQUESTS)
    options = client_options(kafka, "produce") | {"acks": "all", "max_request_size": kafka.max_message_bytes}
    producer: Any = connect(lambda: KafkaProducer(**options), kafka)
    waiting: list[Any] = []

    def settle() -> None:
        with kafka_errors("sending records"):
            producer.flush()
            for future in waiting:
                future.get(timeout=READ_S)
        waiting.clear()

    def send(record: FileRecord) -> None:
        with kafka_errors("sending records"):
            waiting.append(
                producer.send(
                    topic,
                    key=record.key,
                    value=record.value,
                    headers=list(record.headers),
                    timestamp_ms=record.timestamp_ms,
                )
            )
        if len(waiting) >= UNACKNOWLEDGED:
            settle()

    try:
        yield send
        settle()
    finally:
        producer.close()


def newest_registry(settings: Settings) -> Registry:
    """The registry that serve workers activate, read from the broker; an empty one before the first."""
    log = KafkaChangelog(kafka_of(settings, "look"), Topic.EXPERTS)
    try:
        records = [
            record for record in log.catch_up(READ_S) if record.key == codec.REGISTRY_KEY and record.value
        ]
    finally:
        log.close()
    return codec.decode_registry(records[-1]) if records else Registry()


def expert_folder(settings: Settings, version: ExpertVersion) -> Path:
    """The verified files of an expert's version."""
    return expert_store(settings).open(version.storage)


def topic_states(settings: Settings) -> list[TopicState]:
    """Every topic as the broker has it."""
    return describe_topics(settings.kafka)


def embedded_broker(settings: Settings, folder: Path | None, port: int) -> EmbeddedBroker:
    """The broker of one machine, not yet started. A daemon with these settings knows it, wherever its data lies."""
    home = broker_folder(settings)
    return EmbeddedBroker(folder or home, port, known_in=home)


def score(settings: Settings, text: str, tenant: str) -> Mapping[str, Any]:
    """The novelty of a text, asked of the serve worker that uses this data folder."""
    address = _address(settings, "serve")
    if address is None:
        raise DyloraError(
            f"no serve worker has announced itself in {settings.store.folder}: start `dylora-stream run`, or set "
            "store.folder to the one that it uses"
        )
    return ask(f"{address}/novelty", {"input": text, "tenant": tenant})


def sample_stats(settings: Settings) -> Mapping[str, Any]:
    """What learn remembers: of the running one over its port, else out of its database."""
    address = _address(settings, "learn")
    if address is not None:
        with suppress(DyloraError):
            return ask(f"{address}/stats")
    ledger = _ledger_of_learn(settings)
    try:
        return asdict(ledger.summary())
    finally:
        ledger.close()


def retire(settings: Settings, expert_id: str) -> bool:
    """Take an expert out of service; whether a running learn was told, which does it at once.

    Where none runs it is written into its database, and published when learn starts: also where learn does not start
    because this expert's files are damaged. Raises ExpertUnknown.
    """
    address = _address(settings, "learn")
    if address is not None and _answers(address):
        ask(f"{address}/experts/retire", {"expert": expert_id})
        return True
    ledger = _ledger_of_learn(settings)
    try:
        state, clock = ledger.load(), SystemClock()
        version = state.registry.named(expert_id)
        codec = WireCodec(source="/dylora/retire")
        ledger.commit(retirement(version, state.registry, state.rows, codec, clock.now_ms()))
    finally:
        ledger.close()
    return False


def _ledger_of_learn(settings: Settings) -> "DuckLedger":
    """The database that is there: one made here would belong to this user, and say that nothing was ever learned."""
    if not ledger_file(settings).exists():
        raise StoreError(
            f"there is no database in {settings.store.folder.absolute()}, learn has not run there: set store.folder to "
            "the one that it uses"
        )
    return open_ledger(settings)


def _answers(address: str) -> bool:
    with suppress(DyloraError):
        return bool(ask(f"{address}/stats"))
    return False


def doctor_probes(settings: Settings) -> dict[str, Probe]:
    """Everything that the doctor looks at, in the order in which one thing stands on another."""
    quick = replace(settings.kafka, connect_timeout_s=DOCTOR_CONNECT_S)
    return {
        **machine_probes(settings.store.folder, settings.http, settings.model.threads),
        "embedded broker": lambda: _probe_embedded(quick),
        "broker": lambda: _probe_broker(quick),
        "topics": lambda: _probe_topics(quick, creates=settings.topics.create),
        "codecs": _probe_codecs,
        "model": lambda: _probe_model(settings),
        "database": lambda: _probe_database(settings),
        "expert store": lambda: expert_store(settings).check(),
        "registry": lambda: _probe_registry(settings.model_copy(update={"kafka": quick})),
    }


def _address(settings: Settings, role: str) -> str | None:
    with suppress(OSError):
        return (settings.store.folder / f"{role}.http").read_text().strip()
    return None


def _probe_embedded(kafka: KafkaConfig) -> str:
    problem = glibc_problem()
    if problem is not None and any(host in LOOPBACK for host, _ in kafka.servers()):
        raise BrokerError(problem)
    if problem is not None:
        return f"not here, and not needed with {kafka.bootstrap_servers}"
    return "runs on this machine; start it with `dylora-stream broker`"


def _probe_broker(kafka: KafkaConfig) -> str:
    describe_topics(kafka)
    return f"{kafka.bootstrap_servers} answers ({kafka.security_protocol})"


def _probe_topics(kafka: KafkaConfig, *, creates: bool) -> str:
    states = describe_topics(kafka)
    missing = [state.name for state in states if not state.partitions]
    if missing and not creates:
        raise TopicMissing(f"missing: {', '.join(missing)}; create them with `dylora-stream topics create`")
    if missing:
        return f"{len(missing)} of {len(states)} are missing; the first start creates them"
    return ", ".join(f"{state.name} ({state.partitions})" for state in states)


def _probe_codecs() -> str:
    absent = [name for name, module in CODECS.items() if importlib.util.find_spec(module) is None]
    found = ", ".join(["gzip", *(name for name in CODECS if name not in absent)])
    if not absent:
        return found
    packages = " ".join(
        {"snappy": "python-snappy", "lz4": "lz4", "zstd": "zstandard"}[name] for name in absent
    )
    return f"{found}; to read records that others compress with {', '.join(absent)}: pip install {packages}"


def _probe_model(settings: Settings) -> str:
    from dylora_stream.model.fetch import is_model_folder

    folder = model_path(settings)
    if not is_model_folder(folder):
        raise ModelNotFound(
            f"{folder} holds no model yet: run `dylora-stream model fetch`, or correct model.name"
        )
    return f"{settings.model.name} in {folder}"


def _probe_database(settings: Settings) -> str:
    if not ledger_file(settings).exists():
        return "none yet; learn makes it when it starts"
    try:
        ledger = open_ledger(settings)
    except DatabaseBusy:
        return "open in a running process; only one learn may use this data folder"
    try:
        return f"{sum(ledger.summary().rows.values())} rows"
    finally:
        ledger.close()


def _probe_registry(settings: Settings) -> str:
    try:
        registry = newest_registry(settings)
    except TopicMissing:
        if not settings.topics.create:
            raise
        return "none yet; the first start makes its topic"
    for version in registry.experts:
        expert_folder(settings, version)
    return f"number {registry.number}, {len(registry.experts)} experts, all files as their digests say"
