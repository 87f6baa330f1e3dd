"""Gates that weigh ranks once a row: a linear router on the prompt's pooled stem features, one row of weights a rank.

Features are centred and scaled by the first expert's rows, once and for good, and divided by √d. A new expert's rows
start at the mean of its own features, long enough to outbid the old ranks there: with a top-k, a rank that is never
chosen never learns. They learn with their expert; old rows are frozen.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from dylora_stream.core.messages import Policy
from dylora_stream.core.routing import NULL_EXPERT, Routing, to_backbone
from dylora_stream.model.backbone import Tokens
from dylora_stream.model.gates.base import Lesson, Scene, Stage
from dylora_stream.model.gates.learning import by_stem
from dylora_stream.model.gates.table import Tabled
from dylora_stream.model.gates.uniform import Among
from dylora_stream.model.mixture import RankGate
from dylora_stream.model.stem import StemOutput

__all__ = ["RowCompany", "RowRanks", "as_routing"]

CENTRE, SPREAD = "centre", "spread"  # of features, (d,), shared
NOISE = 0.02  # deviation of a new rank's logits from its expert's mean
LEAST_SPREAD = 0.1  # of a feature, as a share of the mean over features
LEAST_LENGTH = 0.1  # squared, of a mean that new rows point along
TINY = 1e-6


class RowRanks(Tabled):
    """Subclasses say how logits become weights. `trained_parts` are (r, d) an expert."""

    ranks: RankGate | None = None
    zero_parts: tuple[str, ...] = ()  # those of them that start at 0

    def weigh(self, z: Tensor, expert_ids: Sequence[str], allowed: Tensor, *, is_training: bool) -> Tensor:
        """(B, E, r) weights; z: (B, d) prepared features, allowed: (B, E) bool."""
        raise NotImplementedError

    def prepared(self, features: Tensor) -> Tensor:
        """(B, d) float32."""
        centre, scale = (self._table.get(part).to(features.device) for part in (CENTRE, SPREAD))
        return (features.float() - centre) / scale * features.shape[-1] ** -0.5

    @torch.no_grad()
    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Allowed experts with a chosen rank."""
        ids = scene.expert_ids
        is_known = np.array(
            [self._table.has(self.trained_parts[0], "", expert_id) for expert_id in ids], dtype=bool
        )
        allowed = scene.allowed & is_known[None] if len(ids) else scene.allowed
        if not allowed.any():
            return to_backbone(len(stem.mask))
        z = self.prepared(stem.features)
        weights = self.weigh(z, ids, torch.from_numpy(allowed).to(z.device), is_training=False)
        return as_routing(weights.cpu().numpy())

    def logits(self, part: str, z: Tensor, expert_ids: Sequence[str]) -> Tensor:
        """(B, E·r)."""
        return z @ self._table.gather(part, "", expert_ids).flatten(0, 1).to(z.device).t()

    def company(self, stage: Stage, lesson: Lesson) -> "RowCompany":
        """The old experts' ranks, competing by row."""
        self._open(stage, lesson)
        return RowCompany(stage, self, lesson.expert_id)

    def young_rows(self, expert_id: str) -> list[nn.Parameter]:
        """Rows of the router that learn with an expert."""
        rows = self._table.tensors(self.trained_parts, expert_id)
        return [row for row in rows if isinstance(row, nn.Parameter)]

    def _open(self, stage: Stage, lesson: Lesson) -> None:
        self._table.follow(stage, young=lesson.expert_id)
        own = torch.from_numpy(lesson.own.features).float().to(stage.backbone.device)
        if not self._table.has(CENTRE):
            deviation = own.std(0, correction=0)
            least = LEAST_SPREAD * deviation.mean() + TINY
            self._table.put((CENTRE, "", ""), own.mean(0))
            self._table.put((SPREAD, "", ""), deviation.clamp(min=float(least)))
        z = self.prepared(own)
        generator = torch.Generator().manual_seed(lesson.seed)
        noise = NOISE * torch.randn((stage.pool.rank, z.shape[1]), generator=generator).to(z.device)
        for part in self.trained_parts:
            rows = (
                torch.zeros_like(noise) if part in self.zero_parts else self._winning(part, z, stage) + noise
            )
            self._table.put((part, "", lesson.expert_id), nn.Parameter(rows))

    @torch.no_grad()
    def _winning(self, part: str, z: Tensor, stage: Stage) -> Tensor:
        """(d,): on rows like z its logit is 1 above the old rank that likes them best."""
        old = [expert_id for expert_id in stage.slots if self._table.has(part, "", expert_id)]
        rival = float(self.logits(part, z, old).mean(0).max()) if old else 0.0
        mean = z.mean(0)
        return mean / mean.square().sum().clamp(min=LEAST_LENGTH) * (1.0 + max(0.0, rival))


class RowCompany(Among):
    """The young expert among all old ones; gates are set where rows are read, with gradients."""

    def __init__(self, stage: Stage, gate: RowRanks, expert_id: str) -> None:
        super().__init__(stage)
        self._stage, self._gate, self._expert_id = stage, gate, expert_id
        self._ids = [*stage.slots, expert_id]

    def parameters(self) -> Sequence[nn.Parameter]:
        """The router's rows of the young expert."""
        return self._gate.young_rows(self._expert_id)

    @contextmanager
    def batch(self, tokens: Tokens) -> Iterator[None]:
        """Ranks are weighed by the prompts' features."""
        with by_stem(self._stage, self._decide)(tokens):
            yield

    def _decide(self, stem: StemOutput) -> None:
        rows = len(stem.mask)
        everyone = torch.ones((rows, len(self._ids)), dtype=torch.bool, device=stem.features.device)
        z = self._gate.prepared(stem.features)
        weights = self._gate.weigh(z, self._ids, everyone, is_training=True)
        self._stage.pool.set_gates(self._members.expand(rows, -1), weights)


def as_routing(weights: np.ndarray) -> Routing:
    """A routing of (n, E, r) float32: members by mean weight, those without any left out."""
    used = weights.mean(-1)  # (n, E)
    most = max(1, int((used > 0).sum(1).max()))
    order = np.argsort(-used, axis=1, kind="stable")[:, :most]
    used = np.take_along_axis(used, order, axis=1)
    members = np.where(used > 0, order, NULL_EXPERT).astype(np.int64)
    ranks = np.take_along_axis(weights, order[:, :, None], axis=1)
    has_expert = used[:, 0] > 0
    used[~has_expert, 0] = 1.0
    policies = tuple(Policy.DENSE if served else Policy.BACKBONE for served in has_expert.tolist())
    return Routing(members, used.astype(np.float32), policies, ranks.astype(np.float32))
