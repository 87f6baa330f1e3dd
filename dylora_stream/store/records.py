"""Clusters, jobs, versions and the registry, as they lie in DuckDB's tables."""

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pyarrow as pa

from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.ledger import ClusterRecord, ClusterState, JobKind, JobRecord, JobState

__all__ = [
    "CLUSTER_SCHEMA", "JOB_SCHEMA", "VERSION_SCHEMA", "cluster_of", "job_of", "job_values", "registry_of",
    "version_values",
]  # fmt: skip

CLUSTER_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("cluster_id", "skill_id", "tenant", "state", "expert_id")]
    + [("created_ms", pa.int64()), ("rows_wanted", pa.int32()), ("rejections", pa.int32())]
)
JOB_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in ("job_id", "kind", "tenant", "state", "cluster_id", "expert_id", "report")
    ]
    + [("created_ms", pa.int64()), ("positions", pa.list_(pa.string())), ("version", pa.int32())]
)
VERSION_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("expert_id", "skill_id", "maturity", "job_id", "manifest")]
    + [("version", pa.int32()), ("parent", pa.int32())]
)


def job_values(job: JobRecord) -> dict[str, Any]:
    """A job as a row of `jobs`."""
    return {field.name: getattr(job, field.name) for field in fields(job)} | {
        "report": json.dumps(dict(job.report))
    }


def version_values(version: ExpertVersion) -> dict[str, Any]:
    """A version as a row of `versions`."""
    return {
        "expert_id": version.expert_id,
        "version": version.version,
        "skill_id": version.skill_id,
        "parent": version.parent,
        "maturity": version.maturity,
        "job_id": version.trained_on.get("job"),
        "manifest": json.dumps(asdict(version)),
    }


def cluster_of(values: dict[str, Any]) -> ClusterRecord:
    """The cluster in a row of `clusters`."""
    return ClusterRecord(**values | {"state": ClusterState(values["state"])})


def job_of(values: dict[str, Any]) -> JobRecord:
    """The job in a row of `jobs`."""
    typed = {"kind": JobKind(values["kind"]), "state": JobState(values["state"])}
    return JobRecord(
        **values | typed | {"positions": tuple(values["positions"]), "report": json.loads(values["report"])}
    )


def registry_of(document: dict[str, Any]) -> Registry:
    """The registry whose fields `dataclasses.asdict` gave."""
    experts = tuple(
        ExpertVersion(
            **entry | {"storage": StoredFolder(**entry["storage"]), "maturity": Maturity(entry["maturity"])}
        )
        for entry in document["experts"]
    )
    router = StoredFolder(**document["router"]) if document["router"] else None
    return replace(Registry(**document | {"experts": (), "router": None}), experts=experts, router=router)
