"""Requests and feedback, in whatever form users write them.

A request is a JSON object when its value starts with `{`, plain text otherwise, or where its content type says
`text/plain`; CloudEvents 1.0 are read in both modes of the Kafka protocol binding: structured
(`application/cloudevents+json`) and binary (`ce_*` headers). What cannot be read raises BadRecord with one of these
reasons:

    empty_record  too_large  invalid_utf8  malformed_json  wrong_type  missing_input  empty_input  invalid_tenant
    invalid_choices  too_many_choices  output_not_in_choices       and for feedback: missing_output  missing_target
    invalid_position

Invariant: decoding never raises anything but BadRecord, whatever the bytes are.

Sources: github.com/cloudevents/spec (spec.md, bindings/kafka-protocol-binding.md).
"""

import base64
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from dylora_stream.core.errors import BadRecord
from dylora_stream.core.messages import DEFAULT_TENANT, Feedback, Position, RawRecord, Request
from dylora_stream.stream.schemas import FeedbackData, RequestData

__all__ = [
    "DEFAULT_LIMITS",
    "RecordLimits",
    "decode_feedback",
    "decode_request",
    "json_object",
    "text_of",
    "validated",
]

STRUCTURED = "application/cloudevents+json"
PLAIN = "text/plain"

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLimits:
    """What a request may cost."""

    max_bytes: int = 1024 * 1024  # of the value; Kafka's own default for a message
    max_choices: int = 64  # each one is a row of the ranking batch

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_choices < 1:
            raise ValueError("max_bytes and max_choices must be at least 1")


DEFAULT_LIMITS = RecordLimits()


def decode_request(record: RawRecord, limits: RecordLimits = DEFAULT_LIMITS) -> Request:
    """The request in a record; BadRecord with a reason when there is none."""
    payload, envelope = _payload(record, limits)
    data = RequestData(input=payload) if isinstance(payload, str) else validated(RequestData, payload)
    if not data.input.strip():
        raise BadRecord("empty_input", "the input is empty or blank")
    choices = _checked_choices(data.choices, data.output, limits)
    return Request(
        position=record.position,
        input=data.input,
        key=record.key,
        id=data.id if data.id is not None else envelope.get("id"),
        output=data.output,
        choices=choices,
        tenant=data.tenant if data.tenant is not None else DEFAULT_TENANT,
        skill=data.skill,
        traceparent=data.traceparent if data.traceparent is not None else envelope.get("traceparent"),
        timestamp_ms=record.timestamp_ms,
    )


def decode_feedback(record: RawRecord, limits: RecordLimits = DEFAULT_LIMITS) -> Feedback:
    """The late answer in a record; BadRecord with a reason when there is none."""
    payload, _ = _payload(record, limits)
    if isinstance(payload, str):
        raise BadRecord("wrong_type", "feedback is a JSON object with `output` and `position` or `id`")
    data = validated(FeedbackData, payload)
    if data.position is None and data.id is None:
        raise BadRecord("missing_target", "feedback needs `position` or `id` of the request that it answers")
    return Feedback(
        position=Position.parse(data.position) if data.position is not None else None,
        id=data.id,
        output=data.output,
        tenant=data.tenant if data.tenant is not None else DEFAULT_TENANT,
        timestamp_ms=record.timestamp_ms,
    )


def _payload(record: RawRecord, limits: RecordLimits) -> tuple[str | dict[str, Any], dict[str, str]]:
    """The JSON object or text that a record carries, and what its envelope says (`id`, `traceparent`)."""
    if not record.value:
        raise BadRecord("empty_record", "the record has no value")
    if len(record.value) > limits.max_bytes:
        raise BadRecord("too_large", f"{len(record.value)} bytes; at most {limits.max_bytes} are taken")
    headers = {name.lower(): value for name, value in record.headers}
    envelope = {
        field: headers[name].decode("utf-8", "replace")
        for field, name in (
            ("traceparent", "ce_traceparent"),
            ("traceparent", "traceparent"),
            ("id", "ce_id"),
        )
        if headers.get(name)
    }
    content_type = _media_type(headers.get("content-type", b"").decode("ascii", "replace"))
    if content_type == STRUCTURED:
        return _structured(json_object(text_of(record.value)), envelope)
    return _content(record.value, content_type), envelope


def _media_type(content_type: str) -> str:
    """Without its parameters."""
    return content_type.split(";", maxsplit=1)[0].strip().lower()


def _content(value: bytes, content_type: str) -> str | dict[str, Any]:
    text = text_of(value)
    if content_type == PLAIN:
        return text
    is_json = content_type == "application/json" or content_type.endswith("+json")
    if text.lstrip().startswith("{") or (is_json and content_type != STRUCTURED):
        return json_object(text)
    return text


def _structured(
    event: dict[str, Any], envelope: dict[str, str]
) -> tuple[str | dict[str, Any], dict[str, str]]:
    """Data and envelope of a CloudEvent that is one JSON object."""
    found = envelope | {
        name: event[name] for name in ("id", "traceparent") if isinstance(event.get(name), str)
    }
    data = event.get("data")
    if data is None and isinstance(event.get("data_base64"), str):
        try:
            raw = base64.b64decode(event["data_base64"], validate=True)
        except ValueError as error:  # binascii.Error is one; characters beyond ASCII raise a plain one
            raise BadRecord("malformed_json", "data_base64 is not base64") from error
        if not raw:
            raise BadRecord("empty_record", "the event has no data")
        return _content(raw, _media_type(str(event.get("datacontenttype", "")))), found
    if data is None:
        raise BadRecord("empty_record", "the event has no data")
    if not isinstance(data, str | dict):
        raise BadRecord("wrong_type", f"the event's data is a {type(data).__name__}, not an object or a text")
    return data, found


def text_of(value: bytes) -> str:
    """The text in bytes; BadRecord when they are not UTF-8."""
    try:
        return value.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord("invalid_utf8", f"byte {error.start} is not UTF-8") from error


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text; BadRecord when there is none."""
    try:
        value = from_json(text)
    except ValueError as error:
        raise BadRecord("malformed_json", str(error)[:200]) from error
    if not isinstance(value, dict):
        raise BadRecord("wrong_type", f"the JSON value is a {type(value).__name__}, not an object")
    return value


def validated(model: type[Model], payload: dict[str, Any]) -> Model:
    """The payload as a model of `schemas`; BadRecord with the first thing that is wrong."""
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "value"
        raise BadRecord(_reason(name, first["type"]), f"`{name}`: {first['msg']}") from None


def _reason(name: str, kind: str) -> str:
    if kind == "missing":
        return f"missing_{name}"
    if name == "choices" or kind == "string_pattern_mismatch":
        return f"invalid_{name}"
    return "wrong_type"


def _checked_choices(choices: list[str] | None, output: str | None, limits: RecordLimits) -> tuple[str, ...]:
    if choices is None:
        return ()
    if not choices or not all(choice.strip() for choice in choices):
        raise BadRecord("invalid_choices", "`choices` is empty or holds a blank one")
    if len(choices) > limits.max_choices:
        raise BadRecord(
            "too_many_choices", f"{len(choices)} choices; generation.max_choices is {limits.max_choices}"
        )
    if len(set(choices)) < len(choices):
        raise BadRecord("invalid_choices", "`choices` holds one twice")
    if output is not None and output not in choices:
        raise BadRecord("output_not_in_choices", "`output` is not one of `choices`")
    return tuple(choices)
