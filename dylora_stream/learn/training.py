"""What a training job is told, and the version that comes of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dylora_stream.core.errors import ModelMismatch
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.ledger import JobKind, JobRecord
from dylora_stream.core.ports import ExpertStore
from dylora_stream.core.recipes import Recipe
from dylora_stream.learn.agenda import JobRequest

__all__ = ["Training"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What every training job carries: recipes, the check's numbers, and whose model it is."""

    seeding: Recipe
    consolidation: Recipe
    check: Mapping[str, float]
    backbone: str
    feature_space: str
    prompt_template: str
    rank: int

    def named(self, registry: Registry) -> Registry:
        """The registry as one of this backbone and feature space."""
        return replace(registry, backbone=self.backbone, feature_space=self.feature_space)

    def refuse_other_model(self, registry: Registry, whose: str) -> None:
        """Raises ModelMismatch where the registry is of another backbone or stem, as serve does. whose: what to call it
        and what belongs to it."""
        for what, found, own in (
            ("backbone", registry.backbone, self.backbone),
            ("feature space", registry.feature_space, self.feature_space),
        ):
            if found not in ("", own):
                raise ModelMismatch(
                    f"{whose} of the {what} {found[:32]}, this process runs {own[:32]}: set model.name, "
                    "model.stem_layers and model.feature_layers back, or use another topic prefix with another "
                    "store.folder"
                )

    def description(self, request: JobRequest, registry: Registry, store: ExpertStore) -> dict[str, Any]:
        """All that the job's result depends on, besides its rows, the seed and the threads."""
        recipe = self.consolidation if request.kind is JobKind.CONSOLIDATE else self.seeding
        served = registry.expert(request.expert_id) if request.expert_id else None
        return {
            "kind": request.kind,
            "tenant": request.tenant,
            "parent": served.version if served else None,
            "skill_id": served.skill_id if served else f"s-{request.cluster_id}",
            "recipe": asdict(recipe),
            "rank": self.rank,
            "check": dict(self.check),
            "backbone": self.backbone,
            "registry": {
                "experts": [_described(version, store) for version in registry.experts],
                "router": str(store.open(registry.router)) if registry.router else None,
            },
        }

    def version(
        self, job: JobRecord, report: Mapping[str, Any], served: ExpertVersion | None, storage: StoredFolder
    ) -> ExpertVersion:
        """The manifest of what the job made; `served` is the version that it takes over from, if any."""
        measured = report.get("heldout", {})
        return ExpertVersion(
            expert_id=job.expert_id or "",
            skill_id=served.skill_id if served else f"s-{job.cluster_id}",
            version=job.version,
            parent=served.version if served else None,
            storage=storage,
            maturity=served.maturity if served else Maturity.NASCENT,
            tenant=job.tenant,
            lora_config=report.get("lora_config", {}),
            trained_on={
                "job": job.job_id,
                "rows": len(job.positions),
                "rows_sha256": report.get("rows_sha256", ""),
            },
            metrics={key: value for key, value in measured.items() if isinstance(value, int | float)},
            prompt_template=self.prompt_template,
        )


def _described(version: ExpertVersion, store: ExpertStore) -> dict[str, Any]:
    return {
        "expert_id": version.expert_id,
        "version": version.version,
        "folder": str(store.open(version.storage)),
        "maturity": version.maturity,
        "tenant": version.tenant,
    }
