"""The topics: what each one needs, creating the missing ones, and a check of those that exist."""

from collections.abc import Mapping
from dataclasses import dataclass

import structlog
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import BrokerResponseError, KafkaError, TopicAlreadyExistsError

from dylora_stream.core.errors import BrokerError, SettingsError, TopicMissing
from dylora_stream.core.messages import Topic
from dylora_stream.stream.kafka import KafkaConfig, client_options, connect, kafka_errors

__all__ = ["TopicLayout", "TopicState", "describe_topics", "ensure_topics", "topic_configs"]

USER_TOPICS = (Topic.REQUESTS, Topic.FEEDBACK)  # what they hold and for how long is the user's
MOST_COPIES = 32_767  # what the protocol has room for
SINGLE_PARTITION = (Topic.EXPERTS,)  # one order of registry records
HOUR_MS = 3_600_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicLayout:
    """How topics are made."""

    requests_partitions: int = (
        4  # of requests, results and dead letters: as many serve workers can share the work
    )
    samples_partitions: int = 1  # owners of clusters; tenants spread over them by key
    replication: int = -1  # copies; -1 is the broker's default
    samples_retention_h: int = 24 * 365  # what learn can be rebuilt from
    create: bool = True  # False: a missing topic is an error

    def __post_init__(self) -> None:
        if self.requests_partitions < 1 or self.samples_partitions < 1 or self.samples_retention_h < 1:
            raise SettingsError("topics: partitions and samples_retention_h must be at least 1")
        if self.replication != -1 and not 1 <= self.replication <= MOST_COPIES:
            raise SettingsError(
                f"topics.replication is {self.replication}: use -1, the broker's default, or 1 to {MOST_COPIES}"
            )

    def partitions(self, topic: Topic) -> int:
        """How many partitions a new topic gets."""
        if topic in (Topic.REQUESTS, Topic.RESULTS, Topic.DEAD_LETTERS):
            return self.requests_partitions
        return self.samples_partitions if topic is Topic.SAMPLES else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicState:
    """A topic as the broker has it; partitions 0 means that it does not exist."""

    topic: Topic
    name: str
    partitions: int
    cleanup: str | None  # None: the broker does not say


def topic_configs(topic: Topic, layout: TopicLayout, max_message_bytes: int) -> dict[str, str]:
    """The broker-side settings of a new topic."""
    if topic in USER_TOPICS:
        return {}
    configs = {"max.message.bytes": str(max_message_bytes)}
    if topic is Topic.EXPERTS:
        return configs | {"cleanup.policy": "compact", "min.compaction.lag.ms": str(HOUR_MS)}
    if topic is Topic.SAMPLES:
        return configs | {
            "cleanup.policy": "delete",
            "retention.ms": str(layout.samples_retention_h * HOUR_MS),
        }
    return configs | {"cleanup.policy": "delete"}


def ensure_topics(config: KafkaConfig, layout: TopicLayout, *topics: Topic) -> list[Topic]:
    """Create what is missing of these topics (of all without one) and check what exists; the topics created.

    Raises TopicMissing and BrokerError.
    """
    wanted = topics or tuple(Topic)
    admin = connect(lambda: KafkaAdminClient(**client_options(config, "admin")), config)
    try:
        with kafka_errors("looking at the topics"):
            states = _states(admin, config)
        missing = [state.topic for state in states if not state.partitions and state.topic in wanted]
        if missing and not layout.create:
            raise TopicMissing(
                f"missing at {config.bootstrap_servers}: {', '.join(config.topic(topic) for topic in missing)}; create "
                "them with `dylora-stream topics create`, set topics.create, or correct kafka.prefix"
            )
        for topic in missing:
            _create(admin, config, layout, topic)
        with kafka_errors("checking the topics"):
            _verify([state for state in _states(admin, config) if state.topic in wanted])
    finally:
        admin.close()
    return missing


def describe_topics(config: KafkaConfig) -> list[TopicState]:
    """Every topic as it is, for `doctor` and `topics`."""
    admin = connect(lambda: KafkaAdminClient(**client_options(config, "admin")), config)
    try:
        with kafka_errors("looking at the topics"):
            return _states(admin, config)
    finally:
        admin.close()


def _create(admin: KafkaAdminClient, config: KafkaConfig, layout: TopicLayout, topic: Topic) -> None:
    name = config.topic(topic)
    wanted = {
        "num_partitions": layout.partitions(topic),
        "replication_factor": layout.replication,
        "configs": topic_configs(topic, layout, config.max_message_bytes),
    }
    with kafka_errors(f"creating topic {name}"):
        try:
            admin.create_topics({name: wanted}, wait_for_metadata=True)
        except TopicAlreadyExistsError:
            admin.wait_for_topics([name])
    log.info("topic_created", topic=name, partitions=wanted["num_partitions"])


def _states(admin: KafkaAdminClient, config: KafkaConfig) -> list[TopicState]:
    known = set(admin.list_topics())
    names = [config.topic(topic) for topic in Topic if config.topic(topic) in known]
    partitions = (
        {found["name"]: len(found["partitions"]) for found in admin.describe_topics(names)} if names else {}
    )
    cleanup = _cleanup_policies(admin, names)
    return [
        TopicState(
            topic=topic,
            name=config.topic(topic),
            partitions=partitions.get(config.topic(topic), 0),
            cleanup=cleanup.get(config.topic(topic)),
        )
        for topic in Topic
    ]


def _cleanup_policies(admin: KafkaAdminClient, names: list[str]) -> Mapping[str, str]:
    """What the broker says of `cleanup.policy`; brokers that do not know the request say nothing."""
    if not names:
        return {}
    try:
        found = admin.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, name) for name in names], config_filter="all"
        )
    except (BrokerResponseError, KafkaError):
        return {}
    topics = found.get("topic", {})
    return {
        name: configs["cleanup.policy"]["value"]
        for name, configs in topics.items()
        if "cleanup.policy" in configs
    }


def _verify(states: list[TopicState]) -> None:
    for state in states:
        if state.topic in SINGLE_PARTITION and state.partitions != 1:
            raise BrokerError(
                f"topic {state.name} has {state.partitions} partitions and must have one: registry records need "
                "one order. Name another with kafka.names, or make the topic anew"
            )
        if state.topic is Topic.EXPERTS and state.cleanup is not None and "compact" not in state.cleanup:
            raise BrokerError(
                f"topic {state.name} has cleanup.policy={state.cleanup}; retention would delete the registry. Set "
                "it to `compact` (kafka-configs --alter --add-config cleanup.policy=compact)"
            )
        if state.topic is Topic.SAMPLES and state.cleanup is not None and "compact" in state.cleanup:
            raise BrokerError(
                f"topic {state.name} is compacted and would lose samples; set cleanup.policy=delete"
            )
