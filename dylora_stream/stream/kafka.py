"""How this system talks to Kafka: its configuration, the border for the client's errors, and the first connection.

The reader is in `source`, the writer in `sink`, topics in `topics`. kafka-python's defaults are unsafe (`latest`,
auto-commit, `read_uncommitted`): all three are set by `consumer_options`.

Sources: kafka-python 3.0 (consumer/group.py, producer/kafka.py, errors.py).
"""

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import structlog
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError

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

__all__ = [
    "KafkaConfig", "client_options", "connect", "consumer_options", "fate_of", "kafka_errors", "translate",
    "wait_for_broker",
]  # fmt: skip

FIRST_WAIT_S = 0.2  # between attempts to reach the broker, doubled each time
LONGEST_WAIT_S = 5.0
ATTEMPT_S = 10.0  # one bootstrap of the client
DEFAULT_PORT = 9092
LEAST_MESSAGE_BYTES = 1024
TOPIC_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
WITH_PASSWORD = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

Client = TypeVar("Client")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaConfig:
    """Where the broker is and how to behave toward it. Secrets are plain here and out of `repr`."""

    bootstrap_servers: str  # "host:port[,host:port…]"
    prefix: str = "dylora."  # of every topic that `names` does not name
    names: Mapping[Topic, str] = field(default_factory=dict)  # whole names of single topics
    group: str = (
        "dylora.serve"  # the consumer group; the setting goes before .serve and .learn, empty: the prefix
    )
    instance: str = (
        "0"  # names this process among its like: static membership and client id; each has its own
    )
    start_from: Literal["earliest", "latest"] | None = (
        None  # where to start when the committed offsets are lost
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: str | None = None  # PLAIN, SCRAM-SHA-256, SCRAM-SHA-512
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_password: str | None = field(default=None, repr=False)
    ssl_check_hostname: bool = True
    connect_timeout_s: float = 60.0  # how long a broker that does not answer is waited for
    request_timeout_s: float = 30.0  # one round trip
    session_timeout_s: float = 45.0  # a member that is silent for longer loses its partitions
    max_poll_interval_s: float = 600.0  # longest answer of one batch; the client leaves the group after it
    transaction_timeout_s: float = 60.0  # the broker aborts after it; inference is outside the transaction
    max_message_bytes: int = 8 * 1024 * 1024  # a sample repeats its request, and JSON escapes up to six-fold
    is_embedded: bool = (
        False  # the embedded broker: polls are paced (`pacing`); `bootstrap` finds out by its marker
    )
    compression: Literal["gzip"] | None = None  # the only codec without further packages

    def __post_init__(self) -> None:
        if not self.bootstrap_servers.strip():
            raise SettingsError(
                "kafka.bootstrap_servers is empty; give host:port, or start `dylora-stream broker`"
            )
        for server in self.servers():
            if not server[0] or not 0 < server[1] < 65536:
                raise SettingsError(f"kafka.bootstrap_servers: {server[0]}:{server[1]} is not host:port")
        if self.security_protocol.startswith("SASL"):
            self._check_credentials()
        if self.connect_timeout_s < 0 or self.request_timeout_s <= 1 or self.transaction_timeout_s <= 0:
            raise SettingsError(
                "kafka: connect_timeout_s ≥ 0, request_timeout_s > 1, transaction_timeout_s > 0"
            )
        if self.session_timeout_s <= 0 or self.max_poll_interval_s <= 0:
            raise SettingsError("kafka: session_timeout_s > 0, max_poll_interval_s > 0")
        if self.max_message_bytes < LEAST_MESSAGE_BYTES:
            raise SettingsError(
                f"kafka.max_message_bytes is {self.max_message_bytes}: use at least {LEAST_MESSAGE_BYTES}"
            )
        self._check_topics()

    def _check_topics(self) -> None:
        """What the broker would refuse with a dump of the request, or take and mix up."""
        names = [self.topic(topic) for topic in Topic]
        for name in names:
            if not TOPIC_NAME.fullmatch(name):
                raise SettingsError(
                    f"{name!r} cannot be a topic's name: letters, digits, dot, underscore and hyphen, 249 at most; "
                    "change kafka.prefix, or kafka.names"
                )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise SettingsError(f"two topics are called {twice}: give each its own name in kafka.names")

    def _check_credentials(self) -> None:
        """The client does not say what it misses, only, after its time-out, that there is no broker."""
        is_complete = self.sasl_username and (self.sasl_password or self.sasl_mechanism not in WITH_PASSWORD)
        if not (self.sasl_mechanism and is_complete):
            raise SettingsError(
                f"{self.security_protocol} needs kafka.sasl_mechanism, kafka.sasl_username, and the password in "
                "DYLORA_KAFKA__SASL_PASSWORD"
            )
        if self.sasl_mechanism not in (*WITH_PASSWORD, "GSSAPI"):
            raise SettingsError(
                f"kafka.sasl_mechanism is {self.sasl_mechanism!r}: use one of {', '.join(WITH_PASSWORD)}"
            )

    def check_files(self) -> None:
        """Whether the files of a TLS connection can be read. Raises SettingsError, which names the one that cannot."""
        if not self.security_protocol.endswith("SSL"):
            return
        context, file = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self.ssl_cafile
        try:
            if file:
                context.load_verify_locations(file)
            file = self.ssl_certfile
            if file:  # without a password the library would ask for one on the terminal
                context.load_cert_chain(file, self.ssl_keyfile, self.ssl_password or "")
        except OSError as error:
            raise SettingsError(
                f"{file} cannot be used for TLS ({error}): correct kafka.ssl_cafile, or kafka.ssl_certfile, "
                "kafka.ssl_keyfile and DYLORA_KAFKA__SSL_PASSWORD; they are PEM files"
            ) from error

    def topic(self, topic: Topic) -> str:
        """The broker's name of a topic."""
        return self.names.get(topic, self.prefix + topic.value)

    def servers(self) -> list[tuple[str, int]]:
        """The bootstrap servers as (host, port); SettingsError when one is not."""
        found = []
        for server in self.bootstrap_servers.split(","):
            host, colon, port = server.strip().rpartition(":")
            if not colon:
                host, port = server.strip(), str(DEFAULT_PORT)
            if not port.isdecimal():
                raise SettingsError(f"kafka.bootstrap_servers: {server.strip()!r} is not host:port")
            found.append((host.strip("[]"), int(port)))
        return found


# ---- what the clients get ----


def client_options(config: KafkaConfig, role: str) -> dict[str, Any]:
    """The options that consumers, producers and admin clients share."""
    options: dict[str, Any] = {
        "bootstrap_servers": [server.strip() for server in config.bootstrap_servers.split(",")],
        "client_id": ".".join(part for part in ("dylora", config.instance, role) if part),
        "security_protocol": config.security_protocol,
        "request_timeout_ms": round(config.request_timeout_s * 1000),
        "bootstrap_timeout_ms": round(ATTEMPT_S * 1000),
    }
    if config.security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": config.sasl_mechanism,
            "sasl_plain_username": config.sasl_username,
            "sasl_plain_password": config.sasl_password,
        }
    if config.security_protocol.endswith("SSL"):
        config.check_files()
        options |= {
            "ssl_cafile": config.ssl_cafile,
            "ssl_certfile": config.ssl_certfile,
            "ssl_keyfile": config.ssl_keyfile,
            "ssl_password": config.ssl_password,
            "ssl_check_hostname": config.ssl_check_hostname,
        }
    return options


def consumer_options(config: KafkaConfig, role: str, *, in_group: bool) -> dict[str, Any]:
    """The options of a consumer: nothing uncommitted, nothing committed behind our back, no silent reset."""
    options = client_options(config, role) | {
        "isolation_level": "read_committed",
        "enable_auto_commit": False,
        "auto_offset_reset": "none" if in_group else "earliest",
        "allow_auto_create_topics": False,
        "max_partition_fetch_bytes": max(1024 * 1024, config.max_message_bytes),
    }
    if in_group:
        options |= {
            "group_id": config.group,
            "group_instance_id": config.instance,
            "partition_assignment_strategy": [CooperativeStickyAssignor()],
            "session_timeout_ms": round(config.session_timeout_s * 1000),
            "heartbeat_interval_ms": max(100, min(3000, round(config.session_timeout_s * 1000 / 6))),
            "max_poll_interval_ms": round(config.max_poll_interval_s * 1000),
        }
    return options


# ---- the client's errors become ours ----

# An old epoch is met when a younger producer took our id over, and when the broker timed our transaction out; the
# client cannot tell them apart. Taking the id back in the first case would fence the younger one, and so on for ever.
FENCED = "ProducerFencedError FencedInstanceIdError InvalidProducerEpochError"
UNREACHABLE = (
    "KafkaConnectionError KafkaTimeoutError MetadataEmptyBrokerList NodeNotReadyError UnknownBrokerIdError "
    "BrokerNotAvailableError NetworkExceptionError RequestTimedOutError SaslAuthenticationFailedError "
    "UnsupportedSaslMechanismError IllegalSaslStateError UnacceptableCredentialError"
)
TOPIC_MISSING = (
    "UnknownTopicOrPartitionError InvalidTopicError UnknownTopicIdError InconsistentTopicIdError "
    "FetchSessionTopicIdError"
)
OFFSETS_LOST = (
    "OffsetOutOfRangeError NoOffsetForPartitionError LogTruncationError PositionOutOfRangeError "
    "OffsetMovedToTieredStorageError"
)
ABORTED = (  # the transaction is lost, or the group moved on; taking the records again is right
    "RetriableError InvalidMetadataError Cancelled CommitFailedError CorrelationIdError InvalidReceiveError "
    "KafkaProtocolError StaleMetadata TooManyInFlightRequests TransactionAbortedError "
    "InvalidFetchRequestError LeaderNotAvailableError NotLeaderForPartitionError ReplicaNotAvailableError "
    "StaleControllerEpochError CoordinatorLoadInProgressError CoordinatorNotAvailableError NotCoordinatorError "
    "NotEnoughReplicasError NotEnoughReplicasAfterAppendError IllegalGenerationError UnknownMemberIdError "
    "RebalanceInProgressError NotControllerError OutOfOrderSequenceNumberError DuplicateSequenceNumberError "
    "InvalidTxnStateError InvalidProducerIdMappingError ConcurrentTransactionsError "
    "TransactionCoordinatorFencedError OperationNotAttemptedError KafkaStorageError UnknownProducerIdError "
    "ReassignmentInProgressError FetchSessionIdNotFoundError InvalidFetchSessionEpochError ListenerNotFoundError "
    "FencedLeaderEpochError UnknownLeaderEpochError StaleBrokerEpochError OffsetNotAvailableError "
    "MemberIdRequiredError PreferredLeaderNotAvailableError EligibleLeadersNotAvailableError "
    "UnstableOffsetCommitError ThrottlingQuotaExceededError TransactionalIdNotFoundError IneligibleReplicaError "
    "NewLeaderElectedError FencedMemberEpochError UnreleasedInstanceIdError StaleMemberEpochError "
    "TransactionAbortableError ShareSessionNotFoundError InvalidShareSessionEpochError FencedStateEpochError "
    "InvalidRecordStateError KafkaError IllegalStateError UnknownError BrokerResponseError"
)
REFUSED = (  # asking again gives the same answer: the configuration or the broker has to change
    "CorruptRecordError IllegalArgumentError KafkaConfigurationError QuotaViolationError UnrecognizedBrokerVersion "
    "UnsupportedCodecError "
    "AuthorizationError NoError MessageSizeTooLargeError OffsetMetadataTooLargeError RecordListTooLargeError "
    "InvalidRequiredAcksError InconsistentGroupProtocolError InvalidGroupIdError InvalidSessionTimeoutError "
    "InvalidCommitOffsetSizeError TopicAuthorizationFailedError GroupAuthorizationFailedError "
    "ClusterAuthorizationFailedError InvalidTimestampError UnsupportedVersionError IncompatibleBrokerVersion "
    "TopicAlreadyExistsError InvalidPartitionsError InvalidReplicationFactorError InvalidReplicationAssignmentError "
    "InvalidConfigurationError InvalidRequestError UnsupportedForMessageFormatError PolicyViolationError "
    "InvalidTransactionTimeoutError TransactionalIdAuthorizationFailedError SecurityDisabledError "
    "LogDirNotFoundError DelegationTokenAuthDisabledError DelegationTokenNotFoundError "
    "DelegationTokenOwnerMismatchError DelegationTokenRequestNotAllowedError DelegationTokenAuthorizationFailedError "
    "DelegationTokenExpiredError InvalidPrincipalTypeError NonEmptyGroupError GroupIdNotFoundError "
    "TopicDeletionDisabledError UnsupportedCompressionTypeError GroupMaxSizeReachedError ElectionNotNeededError "
    "NoReassignmentInProgressError GroupSubscribedToTopicError InvalidRecordError ResourceNotFoundError "
    "DuplicateResourceError InconsistentVoterSetError InvalidUpdateVersionError FeatureUpdateFailedError "
    "PrincipalDeserializationFailureError SnapshotNotFoundError DuplicateBrokerRegistrationError "
    "BrokerIdNotRegisteredError InconsistentClusterIdError UnsupportedAssignorError MismatchedEndpointTypeError "
    "UnsupportedEndpointTypeError UnknownControllerIdError UnknownSubscriptionIdError TelemetryTooLargeError "
    "InvalidRegistrationError InvalidVoterKeyError DuplicateVoterError VoterNotFoundError"
)
_FATES: dict[str, type[BrokerError]] = {
    name: fate
    for names, fate in (
        (FENCED, Fenced), (UNREACHABLE, BrokerUnreachable), (TOPIC_MISSING, TopicMissing),
        (OFFSETS_LOST, OffsetsLost), (ABORTED, TransactionAborted), (REFUSED, BrokerError),
    )
    for name in names.split()
}  # fmt: skip
_ADVICE: dict[type[BrokerError], str] = {
    Fenced: "another process has the same instance id (kafka.instance set to one value on two machines, or a data "
    "folder that was copied), or this one stood still for longer than a transaction may take; set kafka.instance to "
    "another value on each machine, and start this one again",
    BrokerUnreachable: "the broker is not reachable, or it refused the credentials",
    TopicMissing: "create the topic, or let `dylora-stream topics create` do it",
    OffsetsLost: "set kafka.start_from to `earliest` or `latest` to go on from there",
    TransactionAborted: "nothing of the transaction happened",
    BrokerError: "the broker refuses this for good; its configuration or ours has to change",
}


def fate_of(kind: type[BaseException]) -> type[BrokerError] | None:
    """Which of our errors an error class of the client becomes; None when it is not listed itself."""
    return _FATES.get(kind.__name__)


def translate(error: BaseException, doing: str) -> BrokerError:
    """Our error for one of the client's, with what was being done and what to do about it."""
    otherwise = (
        BrokerUnreachable if isinstance(error, ConnectionError | TimeoutError | ssl.SSLError) else BrokerError
    )
    fate = next((found for kind in type(error).__mro__ if (found := fate_of(kind))), otherwise)
    return fate(f"{doing}: {str(error) or type(error).__name__} ({_ADVICE[fate]})")


@contextmanager
def kafka_errors(doing: str) -> Iterator[None]:
    """The border: whatever the client raises inside leaves as one of ours."""
    try:
        yield
    except (KafkaError, OSError) as error:
        raise translate(error, doing) from error


# ---- the first connection ----


def _refusal(server: tuple[str, int], timeout_s: float) -> OSError | None:
    """Why nothing listens there, or None."""
    try:
        socket.create_connection(server, timeout=timeout_s).close()
    except OSError as error:
        return error
    return None


def wait_for_broker(config: KafkaConfig, sleep: Callable[[float], None] = time.sleep) -> None:
    """Return once a bootstrap server accepts a connection; BrokerUnreachable after `connect_timeout_s`. Raises
    SettingsError where no client could connect."""
    config.check_files()
    end, wait = time.monotonic() + config.connect_timeout_s, FIRST_WAIT_S
    while True:
        causes = [_refusal(server, min(ATTEMPT_S, config.request_timeout_s)) for server in config.servers()]
        if None in causes:
            return
        cause = causes[-1]
        left = end - time.monotonic()
        if left <= 0:
            raise BrokerUnreachable(
                f"no broker answers at {config.bootstrap_servers} ({cause}); waited {config.connect_timeout_s:g} s. "
                "Start one with `dylora-stream broker`, or set kafka.bootstrap_servers"
            ) from cause
        log.warning(
            "broker_unreachable",
            servers=config.bootstrap_servers,
            cause=str(cause),
            retry_s=round(wait, 1),
            gives_up_in_s=round(left),
            advice="start one with `dylora-stream broker`, or set kafka.bootstrap_servers",
        )
        sleep(min(wait, left))
        wait = min(wait * 2, LONGEST_WAIT_S)


def connect(make: Callable[[], Client], config: KafkaConfig) -> Client:
    """A client of the library, once the broker answers it; BrokerUnreachable after `connect_timeout_s`."""
    end = time.monotonic() + config.connect_timeout_s
    while True:
        wait_for_broker(config)
        try:
            with kafka_errors(f"connecting to {config.bootstrap_servers}"):
                return make()
        except BrokerUnreachable as error:
            if time.monotonic() >= end:
                raise
            log.warning("broker_unreachable", servers=config.bootstrap_servers, cause=str(error), retry_s=0)
