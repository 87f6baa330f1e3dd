"""The wire format as strict pydantic models, one a message; the shipped JSON Schemas are generated from them.

Numbers that are not finite travel as `null`: JSON has no NaN and no infinity. Unknown fields are ignored in every
message, so that a newer writer does not stop an older reader.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dylora_stream.core.messages import DEFAULT_TENANT

__all__ = [
    "DeadLetterPointer", "FeedbackData", "ManifestData", "NoveltyData", "RegistryData", "RequestData", "ResultData",
    "SampleData", "StoredFolderData", "WeightData", "json_schemas",
]  # fmt: skip

TENANT_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
POSITION_PATTERN = r"^.+:[0-9]{1,10}:[0-9]{1,19}$"  # a 32 bit partition, a 64 bit offset

Tenant = Annotated[str, Field(pattern=TENANT_PATTERN)]
PositionText = Annotated[str, Field(pattern=POSITION_PATTERN, description="topic:partition:offset")]
PolicyName = Literal["backbone", "dense", "sparse"]


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", ser_json_inf_nan="null")


class RequestData(_Wire):
    """A record to answer. `output` makes it a teaching example; `choices` restricts the answer."""

    input: str
    id: str | None = None
    output: str | None = None
    choices: list[str] | None = None
    tenant: Tenant | None = None
    skill: str | None = None
    traceparent: str | None = None


class FeedbackData(_Wire):
    """The right answer, late: `position` or `id` names the request."""

    output: str
    position: PositionText | None = None
    id: str | None = None
    tenant: Tenant | None = None


class NoveltyData(_Wire):
    """How new the input is; higher score = more novel, null = beyond every number."""

    score: float | None
    p_value: float | None
    entropy: float | None
    nearest: str | None


class WeightData(_Wire):
    """One expert's share; expert null is the backbone."""

    expert: str | None
    version: int
    weight: float


class ResultData(_Wire):
    """The answer to one request."""

    id: str | None
    position: PositionText
    output: str
    expert: str | None
    weights: list[WeightData]
    policy: PolicyName
    novel: bool
    novelty: NoveltyData
    model: str
    registry: int
    latency_ms: float | None


class SampleData(_Wire):
    """A record on its way to learn. `features` are little-endian float16, base64."""

    position: PositionText
    id: str | None
    tenant: Tenant
    input: str
    output: str | None
    choices: list[str]
    reason: Literal["novel", "teaching", "share"]
    timestamp_ms: int
    answer: str
    policy: PolicyName
    expert: str | None
    version: int
    novel: bool
    novelty: NoveltyData
    feature_space: str
    features: str


class StoredFolderData(_Wire):
    """A folder in the expert store."""

    path: str
    sha256: str


class ManifestData(_Wire):
    """One version of one expert."""

    expert_id: str
    skill_id: str
    version: int
    parent: int | None
    storage_path: str
    sha256: str
    maturity_state: Literal["seeding", "nascent", "mature", "retired", "rejected"]
    tenant: Tenant = DEFAULT_TENANT
    lora_config: dict[str, Any] = {}
    trained_on: dict[str, Any] = {}
    metrics: dict[str, float | None] = {}
    prompt_template: str = ""


class RegistryData(_Wire):
    """What serve runs, whole; the offset of the record is its number."""

    experts: list[ManifestData]
    router: StoredFolderData | None
    feature_space: str
    backbone: str


class DeadLetterPointer(_Wire):
    """Stands for a dead record that is over the topic's limit: where it is, its digest, and its first 64 KiB."""

    position: PositionText
    sha256: str
    size_bytes: int
    head_base64: str


_MODELS: dict[str, type[_Wire]] = {
    "request": RequestData,
    "feedback": FeedbackData,
    "result": ResultData,
    "sample": SampleData,
    "manifest": ManifestData,
    "registry": RegistryData,
    "dead-letter-pointer": DeadLetterPointer,
}


def json_schemas() -> dict[str, dict[str, Any]]:
    """One JSON Schema (draft 2020-12) a message, by name."""
    return {
        name: {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
        for name, model in _MODELS.items()
    }
