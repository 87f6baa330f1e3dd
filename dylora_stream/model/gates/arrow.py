"""Arrow (2405.11157, as in PEFT): an expert's direction at a layer is the input it stretches most; nothing is trained.

    v_e = top right-singular vector of B_e A_e
    g = softmax of |x·v_e| / T over the 3 largest, a token and layer

The vector comes from a problem of r by r: with Aᵀ = Q_a R_a and B = Q_b R_b, B A = Q_b (R_b R_aᵀ) Q_aᵀ. Against PEFT:
an exact SVD where PEFT iterates powers, and no general-knowledge subtraction. Experts train alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing
from dylora_stream.model.gates.base import Lesson, Scene, Stage
from dylora_stream.model.gates.members import member_softmax, members_of, top_members
from dylora_stream.model.gates.rows import everyone
from dylora_stream.model.gates.table import ExpertTable, Tabled
from dylora_stream.model.mixture import LayerView
from dylora_stream.model.stem import StemOutput

__all__ = ["ArrowConfig", "ArrowGate", "ArrowRanks", "prototype"]

DIRECTION = "direction"  # v_e, (d_in,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowConfig:
    """PEFT's numbers."""

    top_k: int = 3
    """Experts that act at a token and layer."""
    temperature: float = 1.0
    """T of the softmax over them."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"arrow.top_k is {self.top_k}: it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"arrow.temperature is {self.temperature}: it must be above 0")


def prototype(a: Tensor, b: Tensor) -> Tensor:
    """(d_in,) float32, of length 1; 0 where B A is 0. a: (r, d_in), b: (d_out, r)."""
    q_a, r_a = torch.linalg.qr(a.double().t())
    r_b = torch.linalg.qr(b.double()).R
    _, sizes, right = torch.linalg.svd(r_b @ r_a.t())
    return (q_a @ right[0] * (sizes[0] > 0)).float()


class ArrowRanks:
    """A `RankGate` that gives all ranks of an expert one weight."""

    def __init__(self, table: ExpertTable, config: ArrowConfig) -> None:
        self._table, self._config = table, config

    def weigh(self, view: LayerView) -> Tensor:
        """(B, T, D, 1)."""
        directions = self._table.stacked(DIRECTION, view, view.inputs.dtype)  # (D, d_in)
        scores = nn.functional.linear(view.inputs, directions).float().abs()  # (B, T, D)
        is_member = members_of(view)[..., 0].expand(scores.shape)
        chosen = top_members(scores, is_member, self._config.top_k)
        return member_softmax(scores / self._config.temperature, chosen)[..., None]


class ArrowGate(Tabled):
    """Up to three experts a token and layer, by their directions."""

    name = "arrow"

    def __init__(self, config: ArrowConfig | None = None) -> None:
        super().__init__()
        self.ranks = ArrowRanks(self._table, config or ArrowConfig())

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Everyone: the layers decide."""
        del stem
        return everyone(scene)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """The new expert's directions, and those of any expert that has none yet."""
        self._table.follow(stage)
        for expert_id, slot in stage.slots.items():
            for layer in stage.pool.shapes:
                if expert_id == lesson.expert_id or not self._table.has(DIRECTION, layer, expert_id):
                    direction = prototype(*stage.pool.blocks(slot, layer))
                    self._table.put((DIRECTION, layer, expert_id), direction)
