"""Experts as values: versions, their life, and the registry that serve activates whole.

    SEEDING ─► NASCENT ─► MATURE ─► RETIRED        (REJECTED ends a seeding whose check failed)

An expert keeps its id for life; each training gives a version. A version's files never change: they are content
addressed, so `storage_path` and `sha256` name exactly one adapter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from dylora_stream.core.errors import ExpertUnknown
from dylora_stream.core.messages import DEFAULT_TENANT

__all__ = ["EXPERT_ID", "ExpertVersion", "Maturity", "Registry", "StoredFolder"]

EXPERT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Maturity(StrEnum):
    """Where an expert stands in its life."""

    SEEDING = "seeding"  # in training for the first time, not served
    NASCENT = "nascent"  # served densely, shared with established experts or the backbone
    MATURE = "mature"  # takes its rows alone
    RETIRED = "retired"  # out of the registry; its files are kept
    REJECTED = "rejected"  # its held-out check failed


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFolder:
    """A folder in the expert store: path relative to the store's root, and the digest of its content."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertVersion:
    """The manifest of one version of one expert."""

    expert_id: str
    skill_id: str
    version: int
    parent: int | None
    storage: StoredFolder
    maturity: Maturity
    tenant: str = DEFAULT_TENANT
    lora_config: Mapping[str, Any] = field(default_factory=dict)
    trained_on: Mapping[str, Any] = field(default_factory=dict)  # {"job", "rows", "rows_sha256"}
    metrics: Mapping[str, float] = field(default_factory=dict)
    prompt_template: str = ""

    @property
    def name(self) -> str:
        """`id/version`, as logs and tables show it."""
        return f"{self.expert_id}/{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """What serve runs: expert versions, router and calibration, for one backbone and one feature space.

    `number` is the record's offset on the experts topic, -1 before the first one.
    """

    experts: tuple[ExpertVersion, ...] = ()
    router: StoredFolder | None = None
    feature_space: str = ""
    backbone: str = ""
    number: int = -1

    def expert(self, expert_id: str) -> ExpertVersion | None:
        """The served version of an expert, or None."""
        return next((version for version in self.experts if version.expert_id == expert_id), None)

    def named(self, beginning: str) -> ExpertVersion:
        """The expert of this id, or the only one whose id begins so. Raises ExpertUnknown."""
        exact = self.expert(beginning)
        found = [version for version in self.experts if version.expert_id.startswith(beginning)]
        if exact is None and len(found) != 1:
            known = ", ".join(version.expert_id for version in (found or self.experts)) or "none yet"
            raise ExpertUnknown(f"{len(found) or 'no'} expert is called {beginning!r}; there are: {known}")
        return exact or found[0]

    def without(self, expert_id: str) -> "Registry":
        """The registry without this expert."""
        return replace(self, experts=tuple(each for each in self.experts if each.expert_id != expert_id))

    def with_expert(self, version: ExpertVersion) -> "Registry":
        """The registry with this version in its expert's place, or added last."""
        if self.expert(version.expert_id) is None:
            return replace(self, experts=(*self.experts, version))
        return replace(
            self,
            experts=tuple(version if old.expert_id == version.expert_id else old for old in self.experts),
        )
