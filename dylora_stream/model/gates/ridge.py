"""Ridge regression on random features (RanPAC, 2307.02251; RAIL, 2406.18868): exact after every expert.

    H = relu(z W_rand),  G += HᵀH,  Q += HᵀY,  W = (G + λI)⁻¹ Q,  g = argmax of H W

Y is one-hot, in float64. G and Q are sums over rows, so that learning expert after expert gives the batch fit, and
no old row is needed. Against the papers: z is a stem feature, scaled by the first expert's statistics (a rule that
later rows do not change keeps the sums exact); λ is a fixed share of G's mean diagonal, where RanPAC searches it anew
on each task's held-out rows; every expert's rows weigh 1 / n, so that one with many rows is not preferred.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dylora_stream.core.routing import Routing, to_backbone
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Untrained
from dylora_stream.model.gates.rows import Scaling, column_of, each_of, joined, top_one
from dylora_stream.model.stem import StemOutput

__all__ = ["RidgeConfig", "RidgeGate"]

PROJECTION_SEED = 23_070_225  # of W_rand: the same in every process, so that it is no part of the state


@dataclass(frozen=True, slots=True, kw_only=True)
class RidgeConfig:
    """Size and strength."""

    units: int = 2048
    """Random features; RanPAC takes 10,000, which costs 25 times the products and 800 MB."""
    penalty: float = 1.0
    """λ as a share of trace(G) / units, most of which lies in the one direction that all relu features share."""

    def __post_init__(self) -> None:
        if self.units < 1:
            raise ValueError(f"ridge.units is {self.units}: it must be at least 1")
        if not self.penalty > 0:
            raise ValueError(f"ridge.penalty is {self.penalty}: it must be above 0")


class RidgeGate(Untrained):
    """One expert a row, the highest regressed."""

    name = "ridge"

    def __init__(self, config: RidgeConfig | None = None) -> None:
        self._config = config or RidgeConfig()
        self._scaling: Scaling | None = None
        self._gram = torch.zeros(0)  # (H, H) G
        self._sums: dict[str, Tensor] = {}  # expert → (H,) its column of Q
        self._weights: Tensor | None = None  # (H, E) W, solved when it is first asked for
        self._projection = torch.zeros(0)  # (d, H) W_rand

    @property
    def parameters(self) -> int:
        """Of W."""
        return len(self._sums) * self._config.units

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The highest regressed allowed expert of each row, alone."""
        if not self._sums or not scene.expert_ids:
            return to_backbone(len(stem.mask))
        scores = (self._lifted(stem.features) @ self._solved()).numpy()
        return top_one(column_of(dict(zip(self._sums, scores.T, strict=True)), scene, -np.inf), scene)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """Add the new expert's rows to both sums; `lesson`'s other rows are not looked at."""
        del stage
        if self._scaling is None:
            self._open(Scaling.of(lesson.own.features))
            self._gram = torch.zeros((self._config.units, self._config.units), dtype=torch.float64)
        lifted = self._lifted(torch.from_numpy(lesson.own.features))
        self._gram = self._gram + lifted.t() @ lifted / len(lifted)
        self._sums = joined(self._sums, lesson.expert_id, lifted.mean(dim=0))
        self._weights = None

    def state(self) -> dict[str, Tensor]:
        """Scaling, G and Q."""
        if self._scaling is None:
            return {}
        sums = {f"sum:{name}": column for name, column in self._sums.items()}
        return {**self._scaling.state(), "gram": self._gram, **sums}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """W follows from the sums."""
        scaling = Scaling.restored(state)
        if scaling is not None:
            self._open(scaling)
            self._gram, self._sums = state["gram"], each_of(state, "sum")
            self._weights = None

    def _open(self, scaling: Scaling) -> None:
        self._scaling = scaling
        generator = torch.Generator().manual_seed(PROJECTION_SEED)
        shape = (len(scaling.mean), self._config.units)
        self._projection = torch.randn(shape, generator=generator, dtype=torch.float64) * shape[0] ** -0.5

    def _lifted(self, features: Tensor) -> Tensor:
        """(n, H) float64."""
        assert self._scaling is not None
        return (self._scaling(features) @ self._projection).relu()

    def _solved(self) -> Tensor:
        """W; half a second, once after any number of lessons."""
        if self._weights is None:
            strength = self._config.penalty * float(self._gram.trace()) / len(self._gram)
            ridged = self._gram + strength * torch.eye(len(self._gram), dtype=torch.float64)
            sums = torch.stack(list(self._sums.values()), dim=1)  # (H, E)
            self._weights = torch.cholesky_solve(sums, torch.linalg.cholesky(ridged))
        return self._weights
