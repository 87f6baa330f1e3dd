"""Retrieval (LoraRetriever, 2402.09997): g from the cosine of a row's embedding and the experts' embeddings.

    e(x) = z / |z|,  m_e = mean of e over the expert's rows,  score = cos(e(x) - c, m_e - c)

`selection` takes the best expert alone, `mixture` averages the outputs of the best three. Against the paper: the
embedding is the stem's feature, where the paper uses an instruction-tuned sentence embedder, further trained on pairs
of tasks; c, the experts' mean embedding, is taken off, because a language model's states share a large common part that
makes all cosines nearly 1. It moves with each new expert, and with it a row that lies between two experts may. The
paper's third way, averaging parameters, is a different adapter for each row; at a layer its output average is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dylora_stream.core.routing import Routing, to_backbone
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Untrained
from dylora_stream.model.gates.rows import column_of, each_of, joined, shared, top_one
from dylora_stream.model.stem import StemOutput

__all__ = ["RetrieverConfig", "RetrieverGate"]

TINY = 1e-12  # of a norm


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieverConfig:
    """How many experts answer a row."""

    mode: Literal["selection", "mixture"] = "selection"
    """The best alone, or the mean of several outputs."""
    experts: int = 3
    """Of a mixture; the paper's number."""

    def __post_init__(self) -> None:
        if self.mode not in ("selection", "mixture"):
            raise ValueError(f"retriever.mode is {self.mode!r}: use selection or mixture")
        if self.experts < 1:
            raise ValueError(f"retriever.experts is {self.experts}: it must be at least 1")


class RetrieverGate(Untrained):
    """Experts whose rows are most like this one; nothing is trained."""

    name = "retriever"

    def __init__(self, config: RetrieverConfig | None = None) -> None:
        self._config = config or RetrieverConfig()
        self._means: dict[str, Tensor] = {}  # expert → (d,) float64 m_e

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The nearest expert, or the nearest few with equal weights."""
        if not self._means or not scene.expert_ids:
            return to_backbone(len(stem.mask))
        scores = column_of(self._scores(stem.features), scene, -np.inf)
        if self._config.mode == "selection":
            return top_one(scores, scene)
        masked = np.where(scene.allowed, scores, -np.inf)
        rank = np.argsort(np.argsort(-masked, axis=1, kind="stable"), axis=1, kind="stable")
        chosen = np.isfinite(masked) & (rank < self._config.experts)
        return shared(chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1), scene)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """The new expert's embedding."""
        del stage
        embeddings = _unit(torch.from_numpy(lesson.own.features).double())
        self._means = joined(self._means, lesson.expert_id, embeddings.mean(dim=0))

    def state(self) -> dict[str, Tensor]:
        """Embeddings of the experts."""
        return {f"mean:{name}": mean for name, mean in self._means.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Embeddings again."""
        self._means = each_of(state, "mean")

    def _scores(self, features: Tensor) -> dict[str, np.ndarray]:
        """Cosine of each row (B,) with each expert. A lone expert has no other to be told from: all 0."""
        means = torch.stack(list(self._means.values()))  # (E, d)
        centre = means.mean(dim=0)
        rows = _unit(_unit(features.cpu().double()) - centre)
        cosines = rows @ _unit(means - centre).t()  # (B, E)
        return dict(zip(self._means, cosines.t().numpy(), strict=True))


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1, eps=TINY)
