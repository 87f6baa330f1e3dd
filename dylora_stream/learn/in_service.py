"""Which experts are in service, by the database and by the experts topic, which is read at the start and then followed.

A registry record replaces the one before it, so whoever publishes one without having read the last withdraws what
stood there. And a database knows its own work alone: a new one, after a lost one or in a new data folder, knows of no
expert; one of several, or one that takes a partition over, does not know the others'.

An expert is in service where the database or the topic's newest registry has it, until its newest manifest says
`retired`; of two versions the later one counts. That is a union with tombstones: it comes out the same in whatever
order databases hear of one another, and no expert leaves service but by a manifest. Where the newest registry lacks
one (the topic was made anew, or two databases published at the same moment) the registry is published again.

Refusing to start would keep the experts in service as well, but nothing would be learned until a person had decided,
with nothing more to decide by than this.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import structlog

from dylora_stream.core.errors import BadRecord
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry
from dylora_stream.core.messages import OutboundMessage, Position, RawRecord, Topic
from dylora_stream.core.ports import Codec

__all__ = ["ExpertsTopic", "in_service", "missing_from"]

UNREAD = Position("unread", 0, 0)  # of a message that is not on the topic yet, or was not read back

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Said:
    """What records say, read in order: the newest registry, and the experts whose newest manifest says `retired`."""

    registry: Registry = field(default_factory=Registry)
    retired: frozenset[str] = frozenset()


class ExpertsTopic:
    """The experts topic as far as it was read, and what this process has sent there since."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._said = _Said()
        self._sent: list[OutboundMessage] = []  # by this process, and not read back yet

    def sent(self, messages: Iterable[OutboundMessage]) -> None:
        """These are on the broker, behind everything that was read so far."""
        self._sent += [message for message in messages if message.topic is Topic.EXPERTS]

    def hear(self, records: Iterable[RawRecord]) -> bool:
        """The next records of the topic; whether any of them is somebody else's."""
        is_news = False
        for record in records:
            mine = [(message.key, message.value) for message in self._sent]
            if (record.key, record.value) in mine:
                del self._sent[: mine.index((record.key, record.value)) + 1]
            else:
                is_news = True
            self._said = self._with(self._said, record)
        return is_news

    def agree(self, own: Registry, pending: Iterable[OutboundMessage]) -> tuple[Registry, Registry]:
        """What is in service, and what the topic's newest registry will be once everything sent and pending is there.

        own: the database's registry; pending: its outbox.
        """
        unread = [*self._sent, *(message for message in pending if message.topic is Topic.EXPERTS)]
        later = self._said
        for message in unread:
            later = self._with(later, RawRecord(position=UNREAD, key=message.key, value=message.value))
        return in_service(own, self._said.registry, later.retired), later.registry

    def _with(self, said: _Said, record: RawRecord) -> _Said:
        try:
            registry = self._codec.decode_registry(record)
            if registry is not None:
                return replace(said, registry=registry)
            version = self._codec.decode_manifest(record)
        except BadRecord as error:
            log.warning("manifest_unreadable", position=str(record.position), reason=error.reason)
            return said
        expert_id = (record.key or b"").decode(errors="replace")
        if version is None or version.maturity is Maturity.RETIRED:
            return replace(said, retired=said.retired | {expert_id})
        return replace(said, retired=said.retired - {expert_id})


def in_service(own: Registry, served: Registry, retired: Collection[str]) -> Registry:
    """Both registries' experts without the retired ones; the router is the one that was published with them."""
    experts = {version.expert_id: version for version in served.experts}
    for version in own.experts:
        experts[version.expert_id] = max(version, experts.get(version.expert_id, version), key=_age)
    kept = tuple(version for version in experts.values() if version.expert_id not in retired)
    together = replace(served if served.experts else own, experts=kept, number=own.number)
    return together if missing_from(own, together) or len(kept) < len(own.experts) else own


def missing_from(registry: Registry, wanted: Registry) -> list[str]:
    """Experts that `registry` lacks, or has in another version or maturity."""
    has = {(version.expert_id, *_age(version)) for version in registry.experts}
    return [version.expert_id for version in wanted.experts if (version.expert_id, *_age(version)) not in has]


def _age(version: ExpertVersion) -> tuple[int, bool, str]:
    """Sorts versions of one expert; the digest decides where two databases made the same version."""
    return version.version, version.maturity is Maturity.MATURE, version.storage.sha256
