"""Which experts are in service: the union of what databases know, without what was retired, in any order."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest
from learning import CODEC

from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.messages import OutboundMessage, Position, RawRecord, Topic
from dylora_stream.learn.in_service import ExpertsTopic, in_service, missing_from


def expert(name: str, version: int = 1, **changes: object) -> ExpertVersion:
    """A version of an expert."""
    plain = ExpertVersion(
        expert_id=name,
        skill_id="s",
        version=version,
        parent=None,
        storage=StoredFolder(path=f"{name}/{version}", sha256=f"{name}-{version}"),
        maturity=Maturity.NASCENT,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def registry(*experts: ExpertVersion) -> Registry:
    """A registry of these."""
    return Registry(experts=experts, feature_space="space", backbone="digest")


def published(*versions: ExpertVersion, left: Registry) -> list[OutboundMessage]:
    """What one transaction of learn sends: manifests, then the registry."""
    return [*map(CODEC.encode_manifest, versions), CODEC.encode_registry(left)]


def records(messages: list[OutboundMessage]) -> list[RawRecord]:
    """The same, read back."""
    return [
        RawRecord(position=Position("experts", 0, n), key=m.key, value=m.value)
        for n, m in enumerate(messages)
    ]


@pytest.fixture
def topic() -> ExpertsTopic:
    """Nothing was read yet."""
    return ExpertsTopic(CODEC)


def test_the_union_is_the_same_in_any_order() -> None:
    """Experts of three databases; of one that two have, the later version, or the mature one, or either alike."""
    one = registry(expert("a", 2), expert("b"))
    two = registry(expert("a", 1), expert("b", maturity=Maturity.MATURE), expert("c", 3))
    three = registry(expert("c", 3, storage=StoredFolder(path="other", sha256="other")), expert("d"))
    found = []
    for first, second, third in permutations((one, two, three)):
        together = in_service(in_service(first, second, ()), third, ())
        found.append(
            {(each.expert_id, each.version, each.maturity, each.storage.sha256) for each in together.experts}
        )
    assert all(each == found[0] for each in found)
    assert {(name, version) for name, version, _, _ in found[0]} == {("a", 2), ("b", 1), ("c", 3), ("d", 1)}


def test_nothing_new_leaves_the_database_s_registry_as_it_is() -> None:
    """With its router: also where the topic is behind."""
    own = replace(registry(expert("a", 2), expert("b")), router=StoredFolder(path="r", sha256="r"))
    assert in_service(own, registry(expert("b"), expert("a", 1)), ()) is own
    assert in_service(own, Registry(), ()) is own


def test_a_database_without_experts_takes_over_the_topic_s(topic: ExpertsTopic) -> None:
    """Whole: router, feature space and backbone too; nothing needs to be published."""
    served = replace(registry(expert("a"), expert("b")), router=StoredFolder(path="r", sha256="r"))
    assert topic.hear(records(published(expert("a"), expert("b"), left=served)))
    agreed, last = topic.agree(Registry(), [])
    assert agreed == served
    assert missing_from(last, agreed) == []


def test_what_waits_in_the_outbox_is_not_undone(topic: ExpertsTopic) -> None:
    """A promotion and a retirement that the topic has not heard of stand."""
    topic.hear(records(published(expert("a"), expert("b"), left=registry(expert("a"), expert("b")))))
    own = registry(expert("b"), expert("c"))
    pending = published(expert("a", maturity=Maturity.RETIRED), expert("c"), left=own)
    agreed, last = topic.agree(own, pending)
    assert agreed is own
    assert missing_from(last, agreed) == []


@pytest.mark.parametrize("arrives", ["before", "after"])
def test_a_registry_that_was_published_without_reading_withdraws_nobody(
    topic: ExpertsTopic, arrives: str
) -> None:
    """Ours and another's at the same moment, in either order on the topic: both stay, whatever it takes."""
    ours, theirs = (
        published(expert("a"), left=registry(expert("a"))),
        published(expert("b"), left=registry(expert("b"))),
    )
    topic.sent(ours)
    if arrives == "after":
        assert not topic.hear(records(ours))
    assert topic.hear(records(theirs))
    agreed, last = topic.agree(registry(expert("a")), [])
    assert {each.expert_id for each in agreed.experts} == {"a", "b"}
    assert missing_from(last, agreed) == (["b"] if arrives == "before" else ["a"])


def test_one_s_own_messages_are_no_news(topic: ExpertsTopic) -> None:
    """Also where they are read in parts, and where compaction has taken some of them."""
    first, second = published(expert("a"), left=registry(expert("a"))), published(left=registry())
    topic.sent([*first, OutboundMessage(topic=Topic.EVENTS, key=b"e", value=b"{}"), *second])
    assert not topic.hear(records(first)[:1])
    assert not topic.hear(records(second))
    assert topic.hear(records(first))


@pytest.mark.parametrize("farewell", [lambda: CODEC.encode_manifest(expert("a", maturity=Maturity.RETIRED)),
                                      lambda: OutboundMessage(topic=Topic.EXPERTS, key=b"a", value=None)])  # fmt: skip
def test_an_expert_leaves_by_its_manifest(
    topic: ExpertsTopic, farewell: Callable[[], OutboundMessage]
) -> None:
    """Retired by another database, or forgotten by a tombstone; one of the same name may come back."""
    own = registry(expert("a"), expert("b"))
    topic.hear(records([farewell(), CODEC.encode_registry(registry(expert("b")))]))
    agreed, last = topic.agree(own, [])
    assert [each.expert_id for each in agreed.experts] == ["b"]
    assert missing_from(last, agreed) == []
    topic.hear(records(published(expert("a", 2), left=registry(expert("a", 2), expert("b")))))
    agreed, _ = topic.agree(agreed, [])
    assert {each.name for each in agreed.experts} == {"a/2", "b/1"}


def test_a_record_that_is_no_manifest_is_left_out(topic: ExpertsTopic) -> None:
    """Somebody else's program wrote it; the registry before it stays."""
    topic.hear(records(published(expert("a"), left=registry(expert("a")))))
    topic.hear(
        [
            RawRecord(position=Position("experts", 0, 9), key=key, value=b"?")
            for key in (b"a", b"registry", None)
        ]
    )
    agreed, _ = topic.agree(Registry(), [])
    assert [each.expert_id for each in agreed.experts] == ["a"]
