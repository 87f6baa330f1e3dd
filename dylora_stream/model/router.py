"""The router: from the stem's output to experts, weights and novelty, in the pass that answers.

It is built whole from the experts' raw rows, because each new expert moves the pooled covariance of all: discriminant,
modes and calibration are fitted together, and the same registry gives the same router on every worker. Routing changes
nothing in it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.core.novelty import NoveltyConfig, NoveltyScorer, NoveltyScores, distinct_expert
from dylora_stream.core.ports import IndexFactory
from dylora_stream.core.routing import Routing
from dylora_stream.core.statistics import ExpertStatistics, LinearDiscriminant
from dylora_stream.model.gates.base import Gate, Scene, Student
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.stem import StemOutput

__all__ = ["Routed", "Router", "RouterParts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterParts:
    """What every router of a process is built with."""

    gate: Student
    """Untaught; each registry teaches a copy."""
    novelty: NoveltyConfig
    index_factory: IndexFactory
    seed: int = 0
    """Of the calibration's folds: the same on every worker, so that they agree on what is novel."""


@dataclass(frozen=True, slots=True)
class Routed:
    """A batch's routing and novelty."""

    routing: Routing
    scores: NoveltyScores


class Router:
    """Discriminant, network and novelty scorer of one registry; immutable."""

    def __init__(
        self,
        statistics: Sequence[ExpertStatistics],
        network: RouterNetwork | None,
        parts: RouterParts,
        width: int,
    ) -> None:
        """statistics: of feature rows (n, D), whose first `width` numbers are what rows are routed by."""
        self._expert_ids = tuple(expert.expert_id for expert in statistics)
        self._tenants = np.array([expert.tenant for expert in statistics], dtype=object)
        self._is_mature = np.array([expert.is_mature for expert in statistics], dtype=bool)
        self._network = network
        self._gate: Gate = parts.gate
        distinct_rows = [distinct_expert(expert) for expert in statistics]
        self.discriminant = (
            LinearDiscriminant.fit(_routing_part(distinct_rows, width)) if distinct_rows else None
        )
        rng = np.random.default_rng(parts.seed)
        self._scorer = NoveltyScorer.fit(
            distinct_rows, self.discriminant, parts.index_factory, parts.novelty, rng
        )

    def refreshed(self, is_mature: Sequence[bool], network: RouterNetwork | None) -> "Router":
        """The same experts and rows with other maturities or another network: nothing is fitted again."""
        fresh = copy.copy(self)
        fresh._is_mature, fresh._network = np.array(is_mature, dtype=bool), network  # noqa: SLF001 - of its own class
        return fresh

    def gated(self, gate: Gate) -> "Router":
        """The same with another gate."""
        fresh = copy.copy(self)
        fresh._gate = gate  # noqa: SLF001 - of its own class
        return fresh

    def allowed(self, tenants: Sequence[str]) -> np.ndarray:
        """(B, E) bool: a tenant's experts serve that tenant alone."""
        return np.array(tenants, dtype=object)[:, None] == self._tenants[None]

    def route(self, stem: StemOutput, rows: np.ndarray, allowed: np.ndarray) -> Routed:
        """Who answers each row, by the stem, and how new it is, by feature rows (B, D)."""
        scores = self.score(rows, allowed)
        scene = Scene(
            allowed=allowed,
            is_beyond=scores.is_beyond,
            is_mature=self._is_mature,
            discriminant=self.discriminant,
            network=self._network,
            expert_ids=self._expert_ids,
        )
        return Routed(self._gate.decide(stem, scene), scores)

    def score(self, features: np.ndarray, allowed: np.ndarray) -> NoveltyScores:
        """Novelty alone, of feature rows (B, D) float32."""
        return self._scorer.score(features, allowed)


def _routing_part(statistics: Sequence[ExpertStatistics], width: int) -> list[ExpertStatistics]:
    return [ExpertStatistics(expert_id=e.expert_id, rows=e.rows[:, :width]) for e in statistics]
