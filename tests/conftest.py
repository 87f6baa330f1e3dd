"""Brokers for the tests: an embedded one, a real Kafka where there is one, and the better of the two.

A real Kafka is, in this order: DYLORA_TEST_BOOTSTRAP, a container (testcontainers), the folder KAFKA_HOME.
"""

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dylora_stream.stream.broker import ApacheKafka, EmbeddedBroker, glibc_problem

if TYPE_CHECKING:
    from dylora_stream.stream.kafka import KafkaConfig

MakeConfig = Callable[..., "KafkaConfig"]

_numbers = itertools.count()


def pytest_configure() -> None:
    """A shell starts background work with Ctrl-C ignored, which children inherit: commands under test must hear it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def has_docker() -> bool:
    """Whether a Docker daemon answers."""
    if shutil.which("docker") is None:
        return False
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of an embedded broker, started once."""
    problem = glibc_problem()
    if problem is not None:
        pytest.skip(problem)
    with EmbeddedBroker(tmp_path_factory.mktemp("embedded")) as broker:
        yield broker.bootstrap_servers


@pytest.fixture(scope="session")
def real_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of a real Kafka, or a skip."""
    given, home = os.environ.get("DYLORA_TEST_BOOTSTRAP"), os.environ.get("KAFKA_HOME")
    if given:
        yield given
    elif has_docker():
        from testcontainers.kafka import KafkaContainer

        with KafkaContainer().with_kraft() as container:
            yield container.get_bootstrap_server()
    elif home:
        quick = {
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
            "group.min.session.timeout.ms": "1000",
        }
        with ApacheKafka(Path(home), tmp_path_factory.mktemp("kafka"), properties=quick) as broker:
            yield broker.bootstrap_servers
    else:
        pytest.skip("needs a real Kafka: set KAFKA_HOME or DYLORA_TEST_BOOTSTRAP, or start Docker")


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> str:
    """Bootstrap servers of a real Kafka where there is one, of the embedded broker otherwise."""
    is_real = os.environ.get("DYLORA_TEST_BOOTSTRAP") or os.environ.get("KAFKA_HOME") or has_docker()
    servers: str = request.getfixturevalue("real_broker" if is_real else "embedded_broker")
    return servers


@pytest.fixture(scope="session")
def kafka_config() -> MakeConfig:
    """A configuration with a prefix of its own, so that tests share a broker and nothing else."""
    from dylora_stream.stream.kafka import KafkaConfig

    def make(bootstrap_servers: str, **changes: object) -> KafkaConfig:
        prefix = f"test.{os.getpid()}.{next(_numbers)}."
        defaults: dict[str, object] = {
            "bootstrap_servers": bootstrap_servers,
            "prefix": prefix,
            "group": prefix + "group",
            "connect_timeout_s": 10.0,
            "request_timeout_s": 10.0,
            "session_timeout_s": 6.0,
            "transaction_timeout_s": 10.0,
        }
        return KafkaConfig(**(defaults | changes))  # type: ignore[arg-type]

    return make
