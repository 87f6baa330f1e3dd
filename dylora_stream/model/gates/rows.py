"""What gates that weigh experts by row share: a fixed scaling of features, and routings out of scores and weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dylora_stream.core.messages import Policy
from dylora_stream.core.routing import NULL_EXPERT, Routing, to_backbone
from dylora_stream.model.gates.base import Scene

__all__ = ["Scaling", "column_of", "each_of", "everyone", "joined", "shared", "top_one"]

DEVIATION_FLOOR = (
    0.1  # of the median deviation: a dimension that one expert never moved must not drown the others
)


@dataclass(frozen=True, slots=True)
class Scaling:
    """z ↦ √d · u / |u| with u = (z - mean) / deviation, float64.

    Fitted once, on the first expert's rows, so that what is learned on scaled rows never has to be learned again.
    Stem features have a few dimensions with hundred times the variance of the others; rows far from the first expert
    would be large without the normalisation.
    """

    mean: Tensor  # (d,)
    deviation: Tensor  # (d,)

    @classmethod
    def of(cls, features: np.ndarray) -> Self:
        """From rows (n, d)."""
        rows = torch.from_numpy(features).double()
        deviation = rows.std(dim=0, correction=0)
        floor = float(DEVIATION_FLOOR * deviation.median()) or 1.0
        return cls(rows.mean(dim=0), deviation.clamp(min=floor))

    def __call__(self, features: Tensor) -> Tensor:
        """(n, d) → (n, d) float64 on the CPU."""
        rows = (features.detach().cpu().double() - self.mean) / self.deviation
        return torch.nn.functional.normalize(rows, dim=-1) * rows.shape[-1] ** 0.5

    def state(self) -> dict[str, Tensor]:
        """Both, for `restored`."""
        return {"mean": self.mean, "deviation": self.deviation}

    @classmethod
    def restored(cls, state: Mapping[str, Tensor]) -> Self | None:
        """Out of a gate's state; None before the first expert."""
        return cls(state["mean"], state["deviation"]) if "mean" in state else None


def top_one(scores: np.ndarray, scene: Scene) -> Routing:
    """The highest scored allowed expert of each row, alone.

    scores: (B, E), -inf for experts that the gate has not learned. Rows beyond every expert are the backbone's.
    """
    rows = len(scene.allowed)
    masked = np.where(scene.allowed & ~scene.is_beyond[:, None], scores, -np.inf)
    has_expert = np.asarray(np.isfinite(masked).any(axis=1))
    if not has_expert.any():
        return to_backbone(rows)
    experts = np.where(has_expert, masked.argmax(axis=1), NULL_EXPERT)[:, None].astype(np.int64)
    policies = tuple(Policy.SPARSE if served else Policy.BACKBONE for served in has_expert.tolist())
    return Routing(experts, np.ones_like(experts, dtype=np.float32), policies)


def shared(weights: np.ndarray, scene: Scene) -> Routing:
    """Every row to all experts with weight, largest first; weights: (B, E), at least 0.

    Experts that are not allowed lose theirs, the others' are not raised. Rows without any, and rows beyond every
    expert, are the backbone's.
    """
    rows = len(scene.allowed)
    kept = np.where(scene.allowed & ~scene.is_beyond[:, None], weights, 0.0)
    has_expert = np.asarray((kept > 0).any(axis=1))
    if not has_expert.any():
        return to_backbone(rows)
    members = int((kept > 0).sum(axis=1).max())
    experts = np.argsort(-kept, axis=1, kind="stable")[:, :members]
    sorted_weights = np.take_along_axis(kept, experts, axis=1).astype(np.float32)
    experts = np.where(sorted_weights > 0, experts, NULL_EXPERT)
    sorted_weights[~has_expert, 0] = 1.0
    policies = tuple(Policy.DENSE if served else Policy.BACKBONE for served in has_expert.tolist())
    return Routing(experts, sorted_weights, policies)


def everyone(scene: Scene) -> Routing:
    """Every row to all experts that it may use, with weight 1 each: what the sum does, and where the ranks decide."""
    return shared(np.ones(scene.allowed.shape), scene)


def each_of(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Expert id → tensor, of the keys `kind:ID`, sorted by id."""
    return {key.removeprefix(f"{kind}:"): state[key] for key in sorted(state) if key.startswith(f"{kind}:")}


def joined(learned: Mapping[str, Tensor], expert_id: str, value: Tensor) -> dict[str, Tensor]:
    """With this expert's, sorted by id: a state that was stored and read computes in the same order, to the bit."""
    return dict(sorted({**learned, expert_id: value}.items()))


def column_of(learned: Mapping[str, np.ndarray], scene: Scene, missing: float) -> np.ndarray:
    """(B, E) out of columns (B,) by expert id, in the scene's order; `missing` where there is none."""
    absent = np.full(len(scene.allowed), missing)
    return np.stack([learned.get(name, absent) for name in scene.expert_ids], axis=1)
