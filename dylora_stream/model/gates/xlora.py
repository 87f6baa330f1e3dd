"""X-LoRA (2402.07148, as in PEFT): experts are mixed at every token and layer by a small network on hidden states.

    u = tanh(H · norm(h) / √d)                  h: the token's state, H shared by all layers
    g_e = softmax over members of u·c_{layer, e}

Against the paper: h is the stem's output of the same pass, where X-LoRA runs the model twice and reads the last layer
of the pass without adapters. Experts train alone and stay frozen; as in the paper, H and all columns move together when
the gate learns, on stored rows of all experts. Columns start at 0: every expert the same.
"""

import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing
from dylora_stream.model.gates.base import Lesson, Scene, Stage
from dylora_stream.model.gates.learning import Learning, by_ranks, learn_by_answers
from dylora_stream.model.gates.members import member_softmax, members_of
from dylora_stream.model.gates.rows import everyone
from dylora_stream.model.gates.table import ExpertTable, Tabled
from dylora_stream.model.mixture import LayerView
from dylora_stream.model.stem import StemOutput

__all__ = ["XLoRAGate", "XLoRARanks"]

HIDDEN, COLUMN = "hidden", "column"  # H (u, d), shared; c (u,) a layer and expert
UNITS = 64


class XLoRARanks:
    """A `RankGate` that gives all ranks of an expert one weight."""

    def __init__(self, table: ExpertTable) -> None:
        self._table = table
        self._seen: tuple[Tensor, Tensor] | None = None  # the pass's states and their units

    def weigh(self, view: LayerView) -> Tensor:
        """(B, T, D, 1)."""
        logits = self._units(view.states) @ self._table.stacked(COLUMN, view).t()  # (B, T, D)
        return member_softmax(logits, members_of(view)[..., 0])[..., None]

    def forget(self) -> None:
        """Let go of the last pass."""
        self._seen = None

    def _units(self, states: Tensor) -> Tensor:
        """(B, T, u), computed once a pass."""
        if self._seen is None or self._seen[0] is not states:
            width = states.shape[-1]
            normal = nn.functional.layer_norm(states.float(), (width,))
            hidden = self._table.get(HIDDEN).to(states.device)
            self._seen = (states, (normal @ hidden.t() * width**-0.5).tanh())
        return self._seen[1]


class XLoRAGate(Tabled):
    """All experts, softly, a token and layer."""

    name = "xlora"
    trained_parts = (HIDDEN, COLUMN)

    def __init__(self, learning: Learning | None = None) -> None:
        super().__init__()
        self._learning = learning or Learning()
        self.ranks = XLoRARanks(self._table)

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Everyone: the layers decide."""
        del stem
        return everyone(scene)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """A column a layer for the new expert; then all move, if there are two experts to tell apart."""
        self._table.follow(stage)
        device = stage.backbone.device
        if not self._table.has(HIDDEN):
            generator = torch.Generator().manual_seed(lesson.seed)
            hidden = torch.randn((UNITS, stage.backbone.width), generator=generator)
            self._table.put((HIDDEN, "", ""), hidden.to(device))
        for layer in stage.pool.shapes:
            self._table.put((COLUMN, layer, lesson.expert_id), torch.zeros(UNITS, device=device))
        if len(stage.slots) > 1:
            moved = self._table.tensors(self.trained_parts)
            self.ranks.forget()
            learn_by_answers(stage, lesson, by_ranks(stage, self.ranks), moved, self._learning)
        self.ranks.forget()
        self._table.changed()
