"""SMoRA (2501.15103): every rank is an expert, chosen by a router with one row a rank, R (r, d_in) an expert and layer.

    s = sigmoid(R x)                            over the ranks of all members
    g_i = k · s_i / Σ_topk s                     for the k ranks with the largest s + bias, 0 elsewhere

The bias selects and does not weigh; it moves by the sign rule of `balance`. Rows of R learn together with their
expert's A and B. Against the paper: it trains all ranks at once; here old rows, biases and experts are frozen, and
compete, while a new expert's learn. With fewer than k ranks, k is their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing
from dylora_stream.model.gates.balance import BIAS, Balanced
from dylora_stream.model.gates.base import Lesson, Scene, Stage
from dylora_stream.model.gates.members import members_of, spread, top_members
from dylora_stream.model.gates.rows import everyone
from dylora_stream.model.gates.table import ExpertTable, Tabled
from dylora_stream.model.mixture import LayerView
from dylora_stream.model.stem import StemOutput

__all__ = ["SMoRAConfig", "SMoRAGate", "SMoRARanks"]

ROWS = "rows"  # R's, (r, d_in)


@dataclass(frozen=True, slots=True, kw_only=True)
class SMoRAConfig:
    """The paper's numbers."""

    budget: int = 8
    """k: ranks that act at a token and layer."""
    bias_rate: float = 1e-5
    """Of the sign rule, a step."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"smora.budget is {self.budget}: it must be at least 1")
        if self.bias_rate < 0:
            raise ValueError(f"smora.bias_rate is {self.bias_rate}: it must not be negative")


class SMoRARanks:
    """A `RankGate`."""

    def __init__(self, table: ExpertTable, budget: int) -> None:
        self._table, self._budget = table, budget

    def weigh(self, view: LayerView) -> Tensor:
        """(B, T, D, r)."""
        rows = self._table.stacked(ROWS, view, view.inputs.dtype).flatten(0, 1)  # (D·r, d_in)
        scores = nn.functional.linear(view.inputs, rows).float().sigmoid()  # (B, T, D·r)
        is_member = members_of(view).expand(view.low.shape).flatten(2)
        ranked = scores.detach() + self._table.stacked(BIAS, view).flatten()
        return spread(scores, top_members(ranked, is_member, self._budget)).view_as(view.low)


class _Routed(Balanced):
    """The young expert's rows of R learn with it."""

    def parameters(self) -> Sequence[nn.Parameter]:
        rows = self._table.tensors([ROWS], self._expert_id)
        return [row for row in rows if isinstance(row, nn.Parameter)]


class SMoRAGate(Tabled):
    """All experts' ranks compete at every token by a router's scores."""

    name = "smora"
    trained_parts = (ROWS, BIAS)

    def __init__(self, config: SMoRAConfig | None = None) -> None:
        super().__init__()
        self._config = config or SMoRAConfig()
        self.ranks = SMoRARanks(self._table, self._config.budget)

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Everyone: the ranks decide."""
        del stem
        return everyone(scene)

    def company(self, stage: Stage, lesson: Lesson) -> Balanced:
        """The old experts' ranks, competing. R's rows start uniform in ±1/√d_in."""
        self._table.follow(stage, young=lesson.expert_id)
        generator = torch.Generator().manual_seed(lesson.seed)
        device, rank = stage.backbone.device, stage.pool.rank
        for layer, (d_in, _) in stage.pool.shapes.items():
            rows = (torch.rand((rank, d_in), generator=generator) * 2 - 1) * d_in**-0.5
            self._table.put((ROWS, layer, lesson.expert_id), nn.Parameter(rows.to(device)))
            self._table.put((BIAS, layer, lesson.expert_id), torch.zeros(rank, device=device))
        return _Routed(stage, self.ranks, self._table, lesson.expert_id, rate=self._config.bias_rate)
