"""A classifier of domains as the gate (MoA, 2403.03432): g = argmax over experts of softmax(U z + b), labels given.

Against the paper: MoA has a router in each transformer layer, trained by cross-entropy against the domain's label; the
exact form of a layer's router could not be read in a primary source. Here it is one linear classifier on the stem's
features, the one place that this pool routes at, trained by the same supervised loss: cross-entropy over the stored
features of all experts, each expert weighing the same. As in the paper all domains are fitted together, so each lesson
fits the whole classifier again: old columns move.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing, to_backbone
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Untrained
from dylora_stream.model.gates.rows import Scaling, column_of, each_of, top_one
from dylora_stream.model.stem import StemOutput

__all__ = ["ClassifierConfig", "ClassifierGate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierConfig:
    """How it is fitted."""

    steps: int = 100
    """Of L-BFGS at most, on all rows; each costs a millisecond."""
    decay: float = 1e-2
    """Of the squared weights, beside the mean cross-entropy: there are more features than rows."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"moa.steps is {self.steps}: it must be at least 1")
        if self.decay < 0:
            raise ValueError(f"moa.decay is {self.decay}: it must not be negative")


class ClassifierGate(Untrained):
    """One expert a row, the likeliest label."""

    name = "moa"

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        self._config = config or ClassifierConfig()
        self._scaling: Scaling | None = None
        self._weights: dict[str, Tensor] = {}  # expert → (d + 1,) float64 its row of U, and its b last

    @property
    def parameters(self) -> int:
        """U and b."""
        return sum(weight.numel() for weight in self._weights.values())

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The likeliest allowed expert of each row, alone."""
        if self._scaling is None or not scene.expert_ids:
            return to_backbone(len(stem.mask))
        logits = _with_one(self._scaling(stem.features)) @ torch.stack(list(self._weights.values())).t()
        columns = dict(zip(self._weights, logits.t().numpy(), strict=True))
        return top_one(column_of(columns, scene, -np.inf), scene)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """Fit all columns on the stored features of all experts."""
        del stage
        self._scaling = self._scaling or Scaling.of(lesson.own.features)
        names = sorted(lesson.memory)
        rows = [_with_one(self._scaling(torch.from_numpy(lesson.memory[name].features))) for name in names]
        owners = torch.repeat_interleave(torch.tensor([len(part) for part in rows]))
        fitted = _fit(torch.cat(rows), owners, self._config)
        self._weights = dict(zip(names, fitted, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Scaling, U and b."""
        scaling = self._scaling.state() if self._scaling is not None else {}
        return {**scaling, **{f"weight:{name}": weight for name, weight in self._weights.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Both again."""
        self._scaling, self._weights = Scaling.restored(state), each_of(state, "weight")


def _with_one(rows: Tensor) -> Tensor:
    """(n, d) → (n, d + 1), for the bias."""
    return torch.cat([rows, torch.ones((len(rows), 1), dtype=rows.dtype)], dim=1)


@torch.enable_grad()
def _fit(rows: Tensor, owners: Tensor, config: ClassifierConfig) -> Tensor:
    """(E, d + 1): the minimum of a convex loss, from zero."""
    counts = torch.bincount(owners)
    weights = torch.zeros((len(counts), rows.shape[1]), dtype=rows.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=config.steps, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(rows @ weights.t(), owners, weight=1.0 / counts.double())
        value = value + config.decay * weights[:, :-1].square().sum()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return weights.detach()
