"""Bytes to messages and back, as pure functions; fields are in `schemas`, what users write in `incoming`.

Invariant: decoding never raises anything but BadRecord, whatever the bytes are.
Invariant: a sample, a registry and a manifest decode to what was encoded (features to float16's precision).

Sources: github.com/cloudevents/spec (spec.md, bindings/kafka-protocol-binding.md).
"""

import base64
import hashlib
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pydantic import BaseModel
from pydantic_core import to_json

from dylora_stream.core.errors import BadRecord
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.messages import (
    Answer,
    DeadLetter,
    Event,
    Headers,
    Novelty,
    OutboundMessage,
    Policy,
    Position,
    RawRecord,
    Request,
    Sample,
    SampleReason,
    Topic,
)
from dylora_stream.stream.incoming import (
    RecordLimits,
    decode_feedback,
    decode_request,
    json_object,
    text_of,
    validated,
)
from dylora_stream.stream.schemas import (
    DeadLetterPointer,
    ManifestData,
    NoveltyData,
    RegistryData,
    ResultData,
    SampleData,
    StoredFolderData,
    WeightData,
)

__all__ = [
    "ERROR_HEADER", "REGISTRY_KEY", "RecordLimits", "decode_dead_letter", "decode_event", "decode_feedback",
    "decode_manifest", "decode_registry", "decode_request", "decode_result", "decode_sample", "encode_dead_letter",
    "encode_event", "encode_manifest", "encode_registry", "encode_result", "encode_sample",
]  # fmt: skip

REGISTRY_KEY = b"registry"  # the one key of the experts topic that is no expert id
ERROR_HEADER = "dylora.error."  # prefix of the headers that a dead letter carries beside the original ones
HEAD_BYTES = 64 * 1024  # what a pointer keeps of a record that is over the limit
MESSAGE_CHARS = 2000  # an error's text in a header
JSON_HEADER = ("content-type", b"application/json")
FLOAT16_MAX = 65504.0


# ---- results ----


def encode_result(
    request: Request, answer: Answer, *, model: str, registry_number: int, latency_ms: float
) -> OutboundMessage:
    """The result of a request, under the request's key."""
    expert = answer.expert
    data = ResultData(
        id=request.id,
        position=str(request.position),
        output=answer.output,
        expert=expert.expert if expert is not None else None,
        weights=[
            WeightData(expert=each.expert, version=each.version, weight=round(float(each.weight), 6))
            for each in answer.weights
        ],
        policy=answer.policy.value,
        novel=answer.novelty.is_novel,
        novelty=_novelty_data(answer.novelty),
        model=model,
        registry=registry_number,
        latency_ms=round(float(latency_ms), 3),
    )
    headers: Headers = (JSON_HEADER,)
    if request.traceparent is not None:
        headers += (("traceparent", request.traceparent.encode()),)
    return OutboundMessage(topic=Topic.RESULTS, key=request.key, value=_dump(data), headers=headers)


def decode_result(record: RawRecord) -> ResultData:
    """The fields of a result, for readers."""
    return validated(ResultData, json_object(text_of(record.value or b"")))


def _novelty_data(novelty: Novelty) -> NoveltyData:
    return NoveltyData(
        score=float(novelty.score),
        p_value=None if novelty.p_value is None else float(novelty.p_value),
        entropy=float(novelty.entropy),
        nearest=novelty.nearest,
    )


def _novelty(data: NoveltyData, *, is_novel: bool) -> Novelty:
    return Novelty(
        score=math.inf if data.score is None else data.score,
        p_value=data.p_value,
        entropy=0.0 if data.entropy is None else data.entropy,
        nearest=data.nearest,
        is_novel=is_novel,
    )


# ---- events ----


def encode_event(event: Event, *, source: str) -> OutboundMessage:
    """A CloudEvent in binary mode; `event.type` is the short name (`expert.spawned`), `source` the worker's URI."""
    time = datetime.fromtimestamp(event.time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    headers = {
        "ce_specversion": "1.0",
        "ce_id": event.id,
        "ce_type": f"dylora.{event.type}.v1",
        "ce_source": source,
        "ce_subject": event.entity,
        "ce_time": time.replace("+00:00", "Z"),
    }
    return OutboundMessage(
        topic=Topic.EVENTS,
        key=event.entity.encode(),
        value=_json(dict(event.data)),
        headers=(*((name, value.encode()) for name, value in headers.items()), JSON_HEADER),
    )


def decode_event(record: RawRecord) -> Event:
    """The event in a record of the events topic; BadRecord when it is not one."""
    headers = dict(record.headers)
    try:
        name = headers["ce_type"].decode().removeprefix("dylora.").removesuffix(".v1")
        time = datetime.fromisoformat(headers["ce_time"].decode())
        entity = headers.get("ce_subject", b"").decode() or (record.key or b"").decode()
        identity = headers["ce_id"].decode()
    except (KeyError, ValueError) as error:
        raise BadRecord("wrong_type", f"not a CloudEvent in binary mode: {error}") from error
    data = json_object(text_of(record.value or b"{}"))
    return Event(id=identity, type=name, entity=entity, time_ms=round(time.timestamp() * 1000), data=data)


# ---- samples ----


def encode_sample(sample: Sample) -> OutboundMessage:
    """A sample under its tenant's key, features as float16."""
    half = np.clip(np.asarray(sample.features, dtype=np.float32), -FLOAT16_MAX, FLOAT16_MAX).astype("<f2")
    data = SampleData(
        position=str(sample.position),
        id=sample.id,
        tenant=sample.tenant,
        input=sample.input,
        output=sample.output,
        choices=list(sample.choices),
        reason=sample.reason.value,
        timestamp_ms=sample.timestamp_ms,
        answer=sample.answer,
        policy=sample.policy.value,
        expert=sample.expert,
        version=sample.version,
        novel=sample.novelty.is_novel,
        novelty=_novelty_data(sample.novelty),
        feature_space=sample.feature_space,
        features=base64.b64encode(half.tobytes()).decode(),
    )
    return OutboundMessage(
        topic=Topic.SAMPLES, key=sample.tenant.encode(), value=_dump(data), headers=(JSON_HEADER,)
    )


def decode_sample(record: RawRecord) -> Sample:
    """The sample in a record; BadRecord when it is not one. `features`: (d,) float32."""
    data = validated(SampleData, json_object(text_of(record.value or b"")))
    try:
        features = np.frombuffer(base64.b64decode(data.features, validate=True), dtype="<f2").astype(
            np.float32
        )
    except ValueError as error:
        raise BadRecord("wrong_type", f"`features` is not base64 of float16 numbers: {error}") from error
    if not np.isfinite(features).all():
        raise BadRecord("wrong_type", "`features` has a number that is none")
    return Sample(
        position=Position.parse(data.position),
        id=data.id,
        tenant=data.tenant,
        input=data.input,
        output=data.output,
        choices=tuple(data.choices),
        reason=SampleReason(data.reason),
        timestamp_ms=data.timestamp_ms,
        answer=data.answer,
        policy=Policy(data.policy),
        expert=data.expert,
        version=data.version,
        novelty=_novelty(data.novelty, is_novel=data.novel),
        feature_space=data.feature_space,
        features=features,
    )


# ---- experts and the registry ----


def encode_manifest(version: ExpertVersion) -> OutboundMessage:
    """A manifest under its expert's id."""
    key = version.expert_id.encode()
    if key == REGISTRY_KEY:
        raise ValueError("an expert cannot be called `registry`: that key is the registry record's")
    return OutboundMessage(
        topic=Topic.EXPERTS, key=key, value=_dump(_manifest_data(version)), headers=(JSON_HEADER,)
    )


def decode_manifest(record: RawRecord) -> ExpertVersion | None:
    """The manifest in a record of the experts topic, None for a tombstone."""
    if record.value is None:
        return None
    return _manifest(validated(ManifestData, json_object(text_of(record.value))))


def encode_registry(registry: Registry) -> OutboundMessage:
    """The registry record; its number is the offset that it gets."""
    data = RegistryData(
        experts=[_manifest_data(version) for version in registry.experts],
        router=None
        if registry.router is None
        else StoredFolderData(path=registry.router.path, sha256=registry.router.sha256),
        feature_space=registry.feature_space,
        backbone=registry.backbone,
    )
    return OutboundMessage(topic=Topic.EXPERTS, key=REGISTRY_KEY, value=_dump(data), headers=(JSON_HEADER,))


def decode_registry(record: RawRecord) -> Registry:
    """The registry in a record whose key is REGISTRY_KEY, numbered by its offset; a tombstone is the empty one."""
    if record.value is None:
        return Registry(number=record.position.offset)
    data = validated(RegistryData, json_object(text_of(record.value)))
    return Registry(
        experts=tuple(_manifest(each) for each in data.experts),
        router=None
        if data.router is None
        else StoredFolder(path=data.router.path, sha256=data.router.sha256),
        feature_space=data.feature_space,
        backbone=data.backbone,
        number=record.position.offset,
    )


def _manifest_data(version: ExpertVersion) -> ManifestData:
    return ManifestData(
        expert_id=version.expert_id,
        skill_id=version.skill_id,
        version=version.version,
        parent=version.parent,
        storage_path=version.storage.path,
        sha256=version.storage.sha256,
        maturity_state=version.maturity.value,
        tenant=version.tenant,
        lora_config=dict(version.lora_config),
        trained_on=dict(version.trained_on),
        metrics={name: float(value) for name, value in version.metrics.items()},
        prompt_template=version.prompt_template,
    )


def _manifest(data: ManifestData) -> ExpertVersion:
    return ExpertVersion(
        expert_id=data.expert_id,
        skill_id=data.skill_id,
        version=data.version,
        parent=data.parent,
        storage=StoredFolder(path=data.storage_path, sha256=data.sha256),
        maturity=Maturity(data.maturity_state),
        tenant=data.tenant,
        lora_config=data.lora_config,
        trained_on=data.trained_on,
        metrics={name: value for name, value in data.metrics.items() if value is not None},
        prompt_template=data.prompt_template,
    )


# ---- dead letters ----


def encode_dead_letter(letter: DeadLetter, *, limit_bytes: int = 1024 * 1024 - 64 * 1024) -> OutboundMessage:
    """The original bytes and headers plus error headers; over `limit_bytes`, a pointer to them.

    The default leaves 64 KiB of Kafka's 1 MiB for what the error headers and the batch add. A null value becomes an
    empty one: a message without key and value cannot be sent.
    """
    record = letter.record
    errors = {
        "stage": letter.stage,
        "class": letter.reason,
        "message": letter.message[:MESSAGE_CHARS],
        "position": str(record.position),
        "attempts": str(letter.attempts),
    }
    error_headers = tuple(
        (ERROR_HEADER + name, text.encode("utf-8", "replace")) for name, text in errors.items()
    )
    headers_bytes = sum(len(name.encode("utf-8", "replace")) + len(value) for name, value in record.headers)
    value, key = record.value or b"", record.key
    if len(value) + len(key or b"") + headers_bytes <= limit_bytes:
        headers = (*record.headers, *error_headers)
        return OutboundMessage(topic=Topic.DEAD_LETTERS, key=key, value=value, headers=headers)
    pointer = DeadLetterPointer(
        position=str(record.position),
        sha256=hashlib.sha256(value).hexdigest(),
        size_bytes=len(value),
        head_base64=base64.b64encode(value[:HEAD_BYTES]).decode(),
    )
    return OutboundMessage(
        topic=Topic.DEAD_LETTERS,
        key=key if len(key or b"") <= HEAD_BYTES else None,
        value=_dump(pointer),
        headers=(
            *(record.headers if headers_bytes <= HEAD_BYTES else ()),
            *error_headers,
            (ERROR_HEADER + "pointer", b"true"),
        ),
    )


def decode_dead_letter(record: RawRecord) -> DeadLetter:
    """The dead letter in a record, with the original as far as it was kept; BadRecord when it is not one."""
    errors = {
        name.removeprefix(ERROR_HEADER): value.decode("utf-8", "replace")
        for name, value in record.headers
        if name.startswith(ERROR_HEADER)
    }
    value = record.value
    try:
        position, attempts = Position.parse(errors["position"]), int(errors["attempts"])
        if "pointer" in errors:
            pointer = validated(DeadLetterPointer, json_object(text_of(value or b"")))
            value = base64.b64decode(pointer.head_base64)
        original = RawRecord(
            position=position,
            key=record.key,
            value=value,
            headers=tuple((name, text) for name, text in record.headers if not name.startswith(ERROR_HEADER)),
            timestamp_ms=record.timestamp_ms,
        )
        return DeadLetter(
            record=original,
            stage=errors["stage"],
            reason=errors["class"],
            message=errors["message"],
            attempts=attempts,
            is_cut="pointer" in errors,
        )
    except (KeyError, ValueError) as error:
        raise BadRecord("wrong_type", f"not a dead letter: {error}") from error


# ---- JSON ----


def _dump(data: BaseModel) -> bytes:
    return data.model_dump_json().encode()


def _json(value: Mapping[str, Any]) -> bytes:
    return to_json(value, inf_nan_mode="null", fallback=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return str(value)
