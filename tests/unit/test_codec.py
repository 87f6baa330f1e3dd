"""The codec: what is taken, what becomes which dead letter, and that what is written can be read again."""

import base64
import dataclasses
import json
import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_stream.core.errors import BadRecord
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.messages import (
    Answer,
    DeadLetter,
    Event,
    Novelty,
    OutboundMessage,
    Policy,
    Position,
    RawRecord,
    Request,
    RoutingWeight,
    Sample,
    SampleReason,
    Topic,
)
from dylora_stream.stream import codec
from dylora_stream.stream.codec import RecordLimits
from dylora_stream.stream.schemas import json_schemas

AT = Position("dylora.requests", 3, 17)
STRUCTURED = (("content-type", b"application/cloudevents+json; charset=UTF-8"),)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
words = texts.filter(str.strip)
values = st.one_of(
    st.binary(max_size=60),
    texts.map(str.encode),
    texts.map(lambda text: b"{" + text.encode()),
    texts.map(lambda text: json.dumps({"data_base64": text}).encode()),
)


def raw(
    value: bytes | None, headers: tuple[tuple[str, bytes], ...] = (), key: bytes | None = b"k"
) -> RawRecord:
    """A record as the broker gives it."""
    return RawRecord(position=AT, key=key, value=value, headers=headers, timestamp_ms=5)


def received(message: OutboundMessage, offset: int = 0) -> RawRecord:
    """A message as a reader gets it."""
    at = Position(message.topic.value, 0, offset)
    return RawRecord(position=at, key=message.key, value=message.value, headers=message.headers)


def a_novelty(score: float = 1.5) -> Novelty:
    """Some novelty."""
    return Novelty(score=score, p_value=0.25, entropy=0.5, nearest="sums", is_novel=True)


def an_answer() -> Answer:
    """A dense answer."""
    return Answer(
        output="4",
        policy=Policy.DENSE,
        weights=(
            RoutingWeight(expert="sums", version=2, weight=0.75),
            RoutingWeight(expert=None, version=0, weight=0.25),
        ),
        novelty=a_novelty(),
        features=np.zeros(4, dtype=np.float32),
    )


def a_sample(features: np.ndarray) -> Sample:
    """A teaching sample."""
    return Sample(
        position=AT, id="i", tenant="t", input="2+2", output="4", choices=("4", "5"), reason=SampleReason.TEACHING,
        timestamp_ms=7, answer="5", policy=Policy.SPARSE, expert="sums", version=1, novelty=a_novelty(),
        feature_space="stem8", features=features,
    )  # fmt: skip


def a_version(**changes: object) -> ExpertVersion:
    """A manifest."""
    made = ExpertVersion(
        expert_id="sums", skill_id="sums", version=2, parent=1, storage=StoredFolder(path="ab/cd", sha256="00"),
        maturity=Maturity.MATURE, lora_config={"rank": 8}, trained_on={"job": "j", "rows": 96},
        metrics={"heldout": 0.5}, prompt_template="{input}",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


# ---- requests ----


def test_a_json_object_is_read_field_by_field() -> None:
    """Unknown fields are ignored, null is absent."""
    fields = {
        "id": "7", "input": "q", "output": "a", "choices": ["a", "b"], "tenant": "T.1", "skill": None,
        "more": {"x": [1]},
        "traceparent": "00-1",
    }  # fmt: skip
    request = codec.decode_request(raw(json.dumps(fields).encode()))
    assert request == Request(
        position=AT, input="q", key=b"k", id="7", output="a", choices=("a", "b"), tenant="T.1", skill=None,
        traceparent="00-1", timestamp_ms=5,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["hello", "[WARN] disk full", "42", '"quoted"', "  indented\n", "naïve ✓"])
def test_what_does_not_start_like_an_object_is_plain_text(text: str) -> None:
    """Log lines start with brackets and numbers are inputs too."""
    request = codec.decode_request(raw(text.encode()))
    assert (request.input, request.tenant, request.choices) == (text, "default", ())


def test_a_line_that_was_sent_as_plain_text_is_plain_text_though_it_looks_like_an_object() -> None:
    """Log lines may be JSON: `produce --format lines` sends them with the header that says so."""
    line = '{"level": "warn", "message": "disk full"}'
    plain = (("content-type", b"Text/Plain; charset=utf-8"),)
    assert codec.decode_request(raw(line.encode(), plain)).input == line
    packed = {"data_base64": base64.b64encode(line.encode()).decode(), "datacontenttype": "text/plain; a=b"}
    assert codec.decode_request(raw(json.dumps(packed).encode(), STRUCTURED)).input == line


def test_cloudevents_are_read_in_structured_mode() -> None:
    """The event's id and trace are the request's where the data has none; data may be an object or a text."""
    event: dict[str, object] = {
        "specversion": "1.0",
        "id": "e1",
        "source": "s",
        "type": "t",
        "traceparent": "00-2",
    }
    event["data"] = {"input": "q"}
    request = codec.decode_request(raw(json.dumps(event).encode(), STRUCTURED))
    assert (request.input, request.id, request.traceparent) == ("q", "e1", "00-2")
    as_text = codec.decode_request(raw(json.dumps(event | {"data": "plain"}).encode(), STRUCTURED))
    assert as_text.input == "plain"
    data = base64.b64encode(b'{"input": "z", "id": "own"}').decode()
    packed = {"specversion": "1.0", "id": "e1", "data_base64": data}
    request = codec.decode_request(raw(json.dumps(packed).encode(), STRUCTURED))
    assert (request.input, request.id) == ("z", "own")


def test_cloudevents_are_read_in_binary_mode() -> None:
    """The attributes are headers, the value is the data."""
    headers = (("ce_specversion", b"1.0"), ("ce_id", b"e2"), ("ce_traceparent", b"00-3"))
    request = codec.decode_request(raw(b"just text", headers))
    assert (request.input, request.id, request.traceparent) == ("just text", "e2", "00-3")


def test_a_plain_traceparent_header_passes_through_to_the_result() -> None:
    """Request header → request → result header."""
    request = codec.decode_request(raw(b"q", (("traceparent", b"00-4"),)))
    message = codec.encode_result(request, an_answer(), model="m", registry_number=1, latency_ms=1.0)
    assert dict(message.headers)["traceparent"] == b"00-4"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty_record"),
        (b"", "empty_record"),
        (b"x" * 101, "too_large"),
        (b"\xff\xfe", "invalid_utf8"),
        (b'{"input": ', "malformed_json"),
        (b'{"input": "\\ud800"}', "malformed_json"),
        (b'{"a":' + b"[" * 90, "malformed_json"),
        (b'{"input": 3}', "wrong_type"),
        (b'{"input": "q", "id": 3}', "wrong_type"),
        (b'{"input": null}', "wrong_type"),
        (b'{"output": "a"}', "missing_input"),
        (b'{"input": " \\n"}', "empty_input"),
        (b"   ", "empty_input"),
        (b'{"input": "q", "tenant": "a b"}', "invalid_tenant"),
        (b'{"input": "q", "tenant": "a\\n"}', "invalid_tenant"),
        (b'{"input": "q", "choices": []}', "invalid_choices"),
        (b'{"input": "q", "choices": "a"}', "invalid_choices"),
        (b'{"input": "q", "choices": ["a", 1]}', "invalid_choices"),
        (b'{"input": "q", "choices": ["a", "a"]}', "invalid_choices"),
        (b'{"input": "q", "choices": ["a", " "]}', "invalid_choices"),
        (b'{"input": "q", "choices": ["a", "b", "c"]}', "too_many_choices"),
        (b'{"input": "q", "choices": ["a", "b"], "output": "c"}', "output_not_in_choices"),
    ],
)
def test_a_bad_record_has_a_reason_of_its_own(value: bytes | None, reason: str) -> None:
    """Each kind of bad input is told apart, at the stage where it failed."""
    with pytest.raises(BadRecord) as caught:
        codec.decode_request(raw(value), RecordLimits(max_bytes=100, max_choices=2))
    assert (caught.value.reason, caught.value.stage) == (reason, "decode")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"not json", "malformed_json"),
        (b"[1]", "wrong_type"),
        (b'{"id": "1"}', "empty_record"),
        (b'{"data": [1]}', "wrong_type"),
        (b'{"data_base64": "!"}', "malformed_json"),
        ('{"data_base64": "é"}'.encode(), "malformed_json"),
    ],
)
def test_a_bad_structured_event_has_a_reason(value: bytes, reason: str) -> None:
    """The content type promises an event."""
    with pytest.raises(BadRecord) as caught:
        codec.decode_request(raw(value, STRUCTURED))
    assert caught.value.reason == reason


@given(values, st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_the_bytes_are_only_a_bad_record_is_raised(value: bytes, is_structured: bool) -> None:
    """Nothing a producer writes stops the stream."""
    record = raw(value, STRUCTURED if is_structured else ())
    for decode in (
        codec.decode_request,
        codec.decode_feedback,
        codec.decode_sample,
        codec.decode_dead_letter,
    ):
        with suppress(BadRecord):
            decode(record)
    assert (
        codec.encode_dead_letter(DeadLetter(record=record, stage="s", reason="r", message="m")).value
        is not None
    )


@given(words, st.none() | texts, st.lists(words, min_size=1, max_size=4, unique=True))
@settings(max_examples=50, deadline=None)
def test_a_request_written_as_json_is_read_back(text: str, identity: str | None, choices: list[str]) -> None:
    """Any text survives the trip."""
    value = json.dumps({"input": text, "id": identity, "choices": choices, "output": choices[0]}).encode()
    request = codec.decode_request(raw(value))
    assert (request.input, request.id, request.choices) == (text, identity, tuple(choices))


# ---- feedback ----


def test_feedback_names_its_request_by_position_or_id() -> None:
    """One of the two is needed, and the right answer."""
    feedback = codec.decode_feedback(raw(b'{"position": "dylora.requests:3:17", "output": "4"}'))
    assert (feedback.position, feedback.id, feedback.output) == (AT, None, "4")
    assert codec.decode_feedback(raw(b'{"id": "7", "output": "4", "tenant": "t"}')).tenant == "t"
    for value, reason in (
        (b'{"output": "4"}', "missing_target"), (b'{"id": "7"}', "missing_output"), (b"text", "wrong_type"),
        (b'{"position": "here", "output": "4"}', "invalid_position"),
    ):  # fmt: skip
        with pytest.raises(BadRecord) as caught:
            codec.decode_feedback(raw(value))
        assert caught.value.reason == reason


@pytest.mark.parametrize("offset", ["9" * 20, "9" * 5000, "-1", "٣", "", "1\n"])
def test_a_position_that_no_broker_has_is_refused(offset: str) -> None:
    """An offset has 64 bits: Python refuses to read numbers of more than some thousand digits at all."""
    position = f"dylora.requests:0:{offset}"
    sample = json.loads(codec.encode_sample(a_sample(np.zeros(2, np.float32))).value or b"")
    for decode, fields in (
        (codec.decode_feedback, {"output": "4"}),
        (codec.decode_sample, sample),
    ):
        with pytest.raises(BadRecord) as caught:
            decode(raw(json.dumps(fields | {"position": position}).encode()))
        assert caught.value.reason == "invalid_position"


# ---- results and events ----


def test_a_result_has_exactly_the_design_s_fields() -> None:
    """The design's table is the contract with readers."""
    request = codec.decode_request(raw(b'{"id": "7", "input": "2+2"}'))
    message = codec.encode_result(request, an_answer(), model="smol", registry_number=12, latency_ms=3.25)
    assert (message.topic, message.key) == (Topic.RESULTS, b"k")
    assert json.loads(message.value or b"") == {
        "id": "7", "position": "dylora.requests:3:17", "output": "4", "expert": "sums",
        "weights": [
            {"expert": "sums", "version": 2, "weight": 0.75}, {"expert": None, "version": 0, "weight": 0.25}
        ],
        "policy": "dense", "novel": True,
        "novelty": {"score": 1.5, "p_value": 0.25, "entropy": 0.5, "nearest": "sums"},
        "model": "smol", "registry": 12, "latency_ms": 3.25,
    }  # fmt: skip
    assert codec.decode_result(received(message)).weights[0].expert == "sums"


def test_numbers_that_are_not_finite_travel_as_null() -> None:
    """JSON has no infinity; a score that is null is the most novel one."""
    answer = dataclasses.replace(an_answer(), novelty=a_novelty(math.inf))
    request = codec.decode_request(raw(b"q"))
    message = codec.encode_result(request, answer, model="m", registry_number=0, latency_ms=math.nan)
    assert json.loads(message.value or b"")["novelty"]["score"] is None
    sample = dataclasses.replace(a_sample(np.zeros(2, np.float32)), novelty=a_novelty(math.inf))
    assert codec.decode_sample(received(codec.encode_sample(sample))).novelty.score == math.inf


def test_an_event_is_a_cloudevent_in_binary_mode_and_reads_back() -> None:
    """Required attributes are headers; numpy values and positions are plain JSON."""
    event = Event(
        id="e", type="expert.spawned", entity="sums", time_ms=1_700_000_000_123,
        data={"loss": np.float32(0.5), "rows": np.arange(2), "nan": math.nan},
    )  # fmt: skip
    message = codec.encode_event(event, source="/dylora/0/learn")
    headers = dict(message.headers)
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_type"] == b"dylora.expert.spawned.v1"
    assert headers["ce_source"] == b"/dylora/0/learn"
    assert headers["ce_time"] == b"2023-11-14T22:13:20.123Z"
    assert headers["content-type"] == b"application/json"
    again = codec.decode_event(received(message))
    assert again == dataclasses.replace(event, data={"loss": 0.5, "rows": [0, 1], "nan": None})


# ---- samples, experts ----


@given(
    st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=16),
    texts,
    st.none() | texts,
    st.lists(texts, max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_a_sample_reads_back_as_it_was(
    features: list[float], text: str, output: str | None, choices: list[str]
) -> None:
    """Features that float16 can hold come back exactly, text always."""
    sample = dataclasses.replace(
        a_sample(np.array(features, dtype=np.float32)), input=text, output=output, choices=tuple(choices)
    )
    again = codec.decode_sample(received(codec.encode_sample(sample)))
    assert again.features.dtype == np.float32
    assert np.array_equal(again.features, sample.features)
    for field in dataclasses.fields(sample):
        if field.name != "features":
            assert getattr(again, field.name) == getattr(sample, field.name)


def test_features_beyond_float16_are_clipped() -> None:
    """An outlier dimension does not become infinite."""
    again = codec.decode_sample(
        received(codec.encode_sample(a_sample(np.array([1e9, -1e9], dtype=np.float32))))
    )
    assert np.isfinite(again.features).all()


def test_a_manifest_and_a_tombstone_read_back() -> None:
    """A tombstone is None; the registry's key is no expert's."""
    assert codec.decode_manifest(received(codec.encode_manifest(a_version()))) == a_version()
    tombstone = OutboundMessage(topic=Topic.EXPERTS, key=b"sums", value=None)
    assert codec.decode_manifest(received(tombstone)) is None
    with pytest.raises(ValueError, match="registry"):
        codec.encode_manifest(a_version(expert_id="registry"))


def test_a_registry_reads_back_with_its_offset_as_number() -> None:
    """What serve activates is what learn wrote."""
    registry = Registry(
        experts=(a_version(), a_version(expert_id="dates", parent=None, maturity=Maturity.NASCENT)),
        router=StoredFolder(path="r", sha256="1"),
        feature_space="stem8",
        backbone="b",
    )
    message = codec.encode_registry(registry)
    assert message.key == codec.REGISTRY_KEY
    assert codec.decode_registry(received(message, 42)) == dataclasses.replace(registry, number=42)


# ---- dead letters ----


def test_a_dead_letter_keeps_the_original_bytes_and_headers() -> None:
    """The error is in headers beside them."""
    record = raw(b"\xff", (("a", b"1"),))
    letter = DeadLetter(record=record, stage="decode", reason="invalid_utf8", message="byte 0", attempts=2)
    message = codec.encode_dead_letter(letter)
    assert (message.key, message.value) == (b"k", b"\xff")
    assert dict(message.headers) == {
        "a": b"1", "dylora.error.stage": b"decode", "dylora.error.class": b"invalid_utf8",
        "dylora.error.message": b"byte 0", "dylora.error.position": b"dylora.requests:3:17",
        "dylora.error.attempts": b"2",
    }  # fmt: skip
    again = codec.decode_dead_letter(received(message))
    assert dataclasses.replace(again, record=record) == letter
    assert (again.record.position, again.record.value, again.record.headers) == (AT, b"\xff", (("a", b"1"),))


@pytest.mark.parametrize("part", ["value", "key", "headers"])
def test_a_dead_letter_over_the_limit_becomes_a_pointer(part: str) -> None:
    """Whatever is too large, the message stays small and says what it stands for."""
    big = b"x" * 10_000_000
    record = raw(
        big if part == "value" else b"v",
        (("h", big),) if part == "headers" else (),
        big if part == "key" else b"k",
    )
    letter = DeadLetter(record=record, stage="decode", reason="too_large", message="m" * 9999)
    message = codec.encode_dead_letter(letter)
    size = (
        len(message.value or b"") + len(message.key or b"") + sum(len(value) for _, value in message.headers)
    )
    assert size < 200_000
    pointer = json.loads(message.value or b"")
    assert pointer["position"] == str(AT)
    assert pointer["size_bytes"] == len(record.value or b"")
    again = codec.decode_dead_letter(received(message))
    assert (record.value or b"").startswith(again.record.value or b"")


def test_a_record_without_key_and_value_becomes_a_letter_that_can_be_sent() -> None:
    """The client refuses a message without both."""
    letter = DeadLetter(record=raw(None, key=None), stage="decode", reason="empty_record", message="")
    assert codec.encode_dead_letter(letter).value == b""


# ---- schemas ----


def test_every_message_has_a_json_schema() -> None:
    """They are generated from the models that decode."""
    schemas = json_schemas()
    assert {"request", "feedback", "result", "sample", "manifest", "registry", "dead-letter-pointer"} == set(
        schemas
    )
    assert schemas["request"]["required"] == ["input"]
    assert all(schema["$schema"].endswith("2020-12/schema") for schema in schemas.values())
