"""The border to kafka-python: configuration, options, errors, the first connection, embedded ids."""

import inspect
from pathlib import Path

import pytest
from kafka import errors

from dylora_stream.bootstrap.parts import kafka_of
from dylora_stream.bootstrap.tools import embedded_broker
from dylora_stream.core.errors import (
    BrokerError,
    BrokerUnreachable,
    Fenced,
    OffsetsLost,
    SettingsError,
    TopicMissing,
    TransactionAborted,
)
from dylora_stream.core.messages import Topic
from dylora_stream.settings import load_settings
from dylora_stream.stream.broker import EmbeddedBroker, EmbeddedIds, free_port, is_embedded
from dylora_stream.stream.kafka import (
    KafkaConfig,
    client_options,
    consumer_options,
    fate_of,
    kafka_errors,
    wait_for_broker,
)
from dylora_stream.stream.topics import TopicLayout, topic_configs


def test_every_error_of_the_client_becomes_one_of_ours() -> None:
    """A new error class in a new version of the client has to be given a fate."""
    kinds = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.KafkaError)
    ]
    assert len(kinds) > 100
    assert [kind.__name__ for kind in kinds if fate_of(kind) is None] == []


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (errors.ProducerFencedError(), Fenced),
        (errors.InvalidProducerEpochError(), Fenced),
        (errors.KafkaTimeoutError("slow"), BrokerUnreachable),
        (ConnectionResetError("gone"), BrokerUnreachable),
        (errors.UnknownTopicOrPartitionError(), TopicMissing),
        (errors.NoOffsetForPartitionError(), OffsetsLost),
        (errors.OutOfOrderSequenceNumberError(), TransactionAborted),
        (errors.MessageSizeTooLargeError(), BrokerError),
    ],
)
def test_an_error_leaves_the_room_as_ours_with_its_cause(error: Exception, ours: type[BrokerError]) -> None:
    """Nobody outside has to know the client."""
    with pytest.raises(BrokerError, match="reading x") as caught, kafka_errors("reading x"):
        raise error
    assert type(caught.value) is ours
    assert caught.value.__cause__ is error


def test_the_client_s_unsafe_defaults_are_all_set() -> None:
    """`latest`, auto-commit and `read_uncommitted` lose or repeat records."""
    options = consumer_options(KafkaConfig(bootstrap_servers="h:1"), "source", in_group=True)
    assert options["auto_offset_reset"] == "none"
    assert options["enable_auto_commit"] is False
    assert options["isolation_level"] == "read_committed"
    assert options["group_instance_id"] == "0"


def test_secrets_reach_the_client_and_not_the_log() -> None:
    """`repr` is what ends up in logs."""
    config = KafkaConfig(
        bootstrap_servers="h:1", security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-256", sasl_username="alice",
        sasl_password="hush", ssl_password="hush",
    )  # fmt: skip
    options = client_options(config, "sink")
    assert (options["sasl_plain_password"], options["ssl_password"]) == ("hush", "hush")
    assert "hush" not in repr(config)


@pytest.mark.parametrize(
    "changes", [{"bootstrap_servers": " "}, {"bootstrap_servers": "host:port"}, {"connect_timeout_s": -1}]
)
def test_a_wrong_setting_says_which_one(changes: dict[str, object]) -> None:
    """The process exits 2 with the name of the setting."""
    with pytest.raises(SettingsError, match="kafka"):
        KafkaConfig(**({"bootstrap_servers": "h:1"} | changes))  # type: ignore[arg-type]


SASL = {
    "security_protocol": "SASL_SSL",
    "sasl_mechanism": "PLAIN",
    "sasl_username": "u",
    "sasl_password": "p",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sasl_password": None}, "DYLORA_KAFKA__SASL_PASSWORD"),
        ({"sasl_mechanism": "SCRAM-SHA256"}, "kafka.sasl_mechanism is 'SCRAM-SHA256'.*SCRAM-SHA-256"),
        ({"ssl_cafile": "missing.pem"}, "missing.pem.*kafka.ssl_cafile"),
        ({"ssl_cafile": __file__}, "test_kafka.py.*kafka.ssl_cafile"),
        ({"ssl_certfile": "missing.pem"}, "missing.pem.*kafka.ssl_certfile"),
    ],
)
def test_what_no_client_could_connect_with_is_a_wrong_setting_at_once(
    changes: dict[str, object], said: str
) -> None:
    """The client would say, after a minute, that the broker is not reachable."""
    for connect in (wait_for_broker, lambda config: client_options(config, "admin")):
        with pytest.raises(SettingsError, match=said):
            connect(KafkaConfig(**({"bootstrap_servers": "h:1"} | SASL | changes)))  # type: ignore[arg-type]


def test_topics_have_the_prefix_or_a_name_of_their_own() -> None:
    """A user's own topic keeps its name."""
    config = KafkaConfig(bootstrap_servers="h", names={Topic.REQUESTS: "orders"})
    assert (config.topic(Topic.REQUESTS), config.topic(Topic.RESULTS)) == ("orders", "dylora.results")
    assert config.servers() == [("h", 9092)]


def test_a_broker_is_waited_for_with_growing_pauses_and_then_given_up() -> None:
    """The message says where it looked and what to do."""
    pauses: list[float] = []
    config = KafkaConfig(bootstrap_servers=f"127.0.0.1:{free_port()}", connect_timeout_s=0.05)
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1.*dylora-stream broker"):
        wait_for_broker(config, sleep=pauses.append)
    assert pauses
    assert max(pauses) <= 5.0


def test_the_registry_s_topic_is_compacted_and_the_user_s_are_left_alone() -> None:
    """Retention would delete the registry."""
    layout = TopicLayout()
    assert topic_configs(Topic.EXPERTS, layout, 1000)["cleanup.policy"] == "compact"
    assert layout.partitions(Topic.EXPERTS) == 1
    assert topic_configs(Topic.REQUESTS, layout, 1000) == {}
    assert topic_configs(Topic.SAMPLES, layout, 1000)["cleanup.policy"] == "delete"


def test_embedded_ids_are_new_each_time_and_remember_the_last(tmp_path: Path) -> None:
    """A process that comes after a crash initialises the id that the crashed one used."""
    ids = EmbeddedIds("dylora.0.serve", tmp_path / "ids" / "serve")
    assert ids.previous() is None
    assert ids.take() == "dylora.0.serve-1"
    after_a_crash = EmbeddedIds("dylora.0.serve", tmp_path / "ids" / "serve")
    assert after_a_crash.previous() == "dylora.0.serve-1"
    assert after_a_crash.take() == "dylora.0.serve-2"


def test_the_embedded_broker_is_known_by_its_address(tmp_path: Path) -> None:
    """Another address, or no marker at all, is a real Kafka."""
    broker = EmbeddedBroker(tmp_path, 19092)
    assert not is_embedded("127.0.0.1:19092", tmp_path)
    broker.mark(pid=1)
    assert is_embedded("127.0.0.1:19092", tmp_path)
    assert not is_embedded("127.0.0.1:9092", tmp_path)
    assert not is_embedded("127.0.0.1:19092,127.0.0.1:19093", tmp_path)


@pytest.mark.parametrize(("port", "name"), [(19092, "localhost:19092"), (9092, "localhost")])
def test_the_embedded_broker_is_known_by_the_machine_s_name_too(tmp_path: Path, port: int, name: str) -> None:
    """Taken for a real Kafka, it would hide messages from learn after a serve that died."""
    EmbeddedBroker(tmp_path, port).mark(pid=1)
    assert is_embedded(name, tmp_path)


def test_the_embedded_broker_is_known_wherever_its_data_lies(tmp_path: Path) -> None:
    """`broker --data` leaves word in the data folder of the daemon."""
    flags = [f"store.folder={tmp_path / 'daemon'}", "kafka.bootstrap_servers=127.0.0.1:19092"]
    settings = load_settings(flags=flags)
    elsewhere = embedded_broker(settings, tmp_path / "elsewhere", 19092)
    elsewhere.mark(pid=1)
    assert kafka_of(settings, "worker").is_embedded
    assert is_embedded("127.0.0.1:19092", tmp_path / "elsewhere")
    embedded_broker(settings, tmp_path / "third", 19555).mark(pid=1)
    assert kafka_of(settings, "worker").is_embedded
