"""FlyLoRA (2510.08396): A is a sparse random projection that never learns and routes as it stands; B learns.

    g_i = 1 for the k ranks of all members with the largest |A_i x + d_i|, 0 elsewhere

A quarter of A's entries are normal with deviation 1/r, the rest 0, drawn for each expert from the lesson's seed and the
expert's id. d moves by the sign rule of `balance`; it selects, and takes no part in the output. Against the paper: one
expert there has 32 ranks of which 8 act; here the ranks of all experts compete for the 8, old ones frozen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from dylora_stream.core.routing import Routing
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.gates.balance import BIAS, Balanced
from dylora_stream.model.gates.base import Lesson, Scene, Stage
from dylora_stream.model.gates.members import members_of, top_members
from dylora_stream.model.gates.rows import everyone
from dylora_stream.model.gates.table import ExpertTable, Tabled
from dylora_stream.model.mixture import LayerView
from dylora_stream.model.stem import StemOutput

__all__ = ["FlyLoRAConfig", "FlyLoRAGate", "FlyLoRARanks", "initial_adapter"]

DENSITY = 0.25  # of A's entries: the paper's 8 of 32


@dataclass(frozen=True, slots=True, kw_only=True)
class FlyLoRAConfig:
    """The paper's numbers."""

    budget: int = 8
    """k: ranks that act at a token and layer."""
    bias_rate: float = 1e-3
    """Of the sign rule, a step."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"flylora.budget is {self.budget}: it must be at least 1")
        if self.bias_rate < 0:
            raise ValueError(f"flylora.bias_rate is {self.bias_rate}: it must not be negative")


def initial_adapter(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    """A sparse and random, the same number of entries in every row; B zero. shapes: layer → (d_in, d_out)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (d_in, d_out) in shapes.items():
        places = torch.rand((rank, d_in), generator=generator).argsort(-1)
        kept = places < max(1, round(DENSITY * d_in))
        a = torch.randn((rank, d_in), generator=generator) / rank * kept
        tensors[layer] = (a, torch.zeros((d_out, rank)))
    return Adapter(rank=rank, tensors=tensors)


class FlyLoRARanks:
    """A `RankGate`."""

    def __init__(self, table: ExpertTable, budget: int) -> None:
        self._table, self._budget = table, budget

    def weigh(self, view: LayerView) -> Tensor:
        """(B, T, D, r) of 0 and 1."""
        moved = (view.low.detach().float() + self._table.stacked(BIAS, view)).abs().flatten(2)  # (B, T, D·r)
        is_member = members_of(view).expand(view.low.shape).flatten(2)
        return top_members(moved, is_member, self._budget).view_as(view.low).float()


class _FrozenA(Balanced):
    """B alone learns."""

    trains_a = False


class FlyLoRAGate(Tabled):
    """All experts' ranks compete at every token by the size of what their fixed A gives."""

    name = "flylora"
    trained_parts = (BIAS,)

    def __init__(self, config: FlyLoRAConfig | None = None) -> None:
        super().__init__()
        self._config = config or FlyLoRAConfig()
        self.ranks = FlyLoRARanks(self._table, self._config.budget)

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Everyone: the ranks decide."""
        del stem
        return everyone(scene)

    def start(self, stage: Stage, lesson: Lesson) -> Adapter:
        """What the new expert starts from, for `TrainingOptions.start`."""
        seed = lesson.seed * 2**32 + crc32(lesson.expert_id.encode())
        return initial_adapter(stage.pool.shapes, stage.pool.rank, seed % 2**63)

    def company(self, stage: Stage, lesson: Lesson) -> Balanced:
        """The old experts' ranks, competing; A stays."""
        self._table.follow(stage, young=lesson.expert_id)
        for layer in stage.pool.shapes:
            d = torch.zeros(stage.pool.rank, device=stage.backbone.device)
            self._table.put((BIAS, layer, lesson.expert_id), d)
        return _FrozenA(stage, self.ranks, self._table, lesson.expert_id, rate=self._config.bias_rate)
