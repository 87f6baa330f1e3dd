"""Decompose and compose (2601.22828): experts are taken apart into ranks, and a row is answered by R of them.

    p = softmax over the R largest of W z, times R          z: the row's pooled stem features
    training: the R ranks with the most votes (summed p) of the batch answer all its rows
    penalty λ · mean over layers of Σ |A_new a_iᵀ|           over the old ranks i that are used more than the mean

Against the paper: z is pooled, because in a causal model the first token has seen nothing of the row; and the batch
votes in training alone: while serving, a vote would make a row's answer depend on its neighbours. How the paper weighs
the chosen ranks was not found: a softmax over them. Use is measured on the stored rows each time an expert was added. A
new expert's rows of W learn with it, old ones are frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dylora_stream.model.gates.base import Lesson, Stage
from dylora_stream.model.gates.members import member_softmax, top_members, top_softmax
from dylora_stream.model.gates.row_ranks import RowCompany, RowRanks
from dylora_stream.model.mixture import Pairs

__all__ = ["ComposeConfig", "ComposeGate"]

ROWS, USE = "rows", "use"  # W's (r, d) an expert; the share of stored rows that use each rank, (r,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposeConfig:
    """How many ranks answer, and how far new ones are kept from old."""

    budget: int = 8
    """R: ranks of a row."""
    orthogonality: float = 0.5
    """λ."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"compose.budget is {self.budget}: it must be at least 1")
        if self.orthogonality < 0:
            raise ValueError(f"compose.orthogonality is {self.orthogonality}: it must not be negative")


class _Apart(RowCompany):
    """With the penalty."""

    def __init__(self, stage: Stage, gate: "ComposeGate", expert_id: str) -> None:
        super().__init__(stage, gate, expert_id)
        self._often, self._weight = gate.often_used(stage), gate.orthogonality

    def penalty(self, pairs: Pairs) -> Tensor | None:
        if not any(bool(is_often.any()) for is_often in self._often.values()):
            return None
        overlaps = [
            (a @ self._stage.pool.blocks(slot, layer)[0][is_often].to(a.dtype).t()).abs().sum()
            for layer, (a, _) in pairs.items()
            for slot, is_often in self._often.items()
        ]
        return self._weight * torch.stack(overlaps).sum() / len(pairs)


class ComposeGate(RowRanks):
    """R ranks a row, from anywhere in the pool."""

    name = "compose"
    trained_parts = (ROWS,)

    def __init__(self, config: ComposeConfig | None = None) -> None:
        super().__init__()
        self._config = config or ComposeConfig()
        self.orthogonality = self._config.orthogonality

    def weigh(self, z: Tensor, expert_ids: Sequence[str], allowed: Tensor, *, is_training: bool) -> Tensor:
        """(B, E, r)."""
        logits = self.logits(ROWS, z, expert_ids)  # (B, E·r)
        rank = logits.shape[1] // len(expert_ids)
        is_member = allowed[:, :, None].expand(-1, -1, rank).flatten(1)
        weights = top_softmax(logits, is_member, self._config.budget)
        if is_training:
            votes = weights.detach().sum(0)
            elected = top_members(votes, torch.ones_like(votes, dtype=torch.bool), self._config.budget)
            weights = member_softmax(logits, elected.expand_as(logits)) * elected.sum()
        return weights.unflatten(1, (len(expert_ids), rank))

    def company(self, stage: Stage, lesson: Lesson) -> RowCompany:
        """The old experts' ranks, competing by row, the often used ones kept away from."""
        self._open(stage, lesson)
        return _Apart(stage, self, lesson.expert_id)

    @torch.no_grad()
    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """The new expert's rows stay; use is counted on the stored rows."""
        super().learn(stage, lesson)
        ids = [expert_id for expert_id in stage.slots if self._table.has(ROWS, "", expert_id)]
        uses = [
            self._use(torch.from_numpy(m.features), ids) for m in lesson.memory.values() if len(m.features)
        ]
        for expert_id, use in zip(ids, torch.stack(uses).mean(0), strict=True):
            self._table.put((USE, "", expert_id), use)

    def often_used(self, stage: Stage) -> dict[int, Tensor]:
        """Slot → (r,) bool: the ranks used more than the mean of all, or as much."""
        ids = [expert_id for expert_id in stage.slots if self._table.has(USE, "", expert_id)]
        if not ids:
            return {}
        use = self._table.gather(USE, "", ids)
        return {stage.slots[expert_id]: row >= use.mean() for expert_id, row in zip(ids, use, strict=True)}

    def _use(self, features: Tensor, expert_ids: Sequence[str]) -> Tensor:
        """(E, r): the share of rows that use each rank."""
        z = self.prepared(features.to(self._table.get(ROWS, "", expert_ids[0]).device))
        allowed = torch.ones((len(z), len(expert_ids)), dtype=torch.bool, device=z.device)
        return (self.weigh(z, expert_ids, allowed, is_training=False) != 0).float().mean(0)
