"""Hierarchical: an expert-level gate decides whose ranks may speak, MoRA weighs the ranks inside (2506.21035 within).

    g_{e, i} = g_e(row) · MoRA over the ranks of the row's members

An expert trains under MoRA among its own ranks alone, so it does not depend on the order in which experts came, and a
row with one member gets what that expert was trained to say, whoever else stands in the pool.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dylora_stream.core.routing import Routing
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Student
from dylora_stream.model.gates.closed_form import ClosedFormGate
from dylora_stream.model.gates.mora import MoRAConfig, MoRARanks
from dylora_stream.model.gates.uniform import Among
from dylora_stream.model.stem import StemOutput

__all__ = ["HierarchicalGate"]


class HierarchicalGate:
    """`expert_gate` (the closed form) over experts, times MoRA over the ranks of those it chose."""

    name = "hierarchical"
    is_order_free = True  # an expert's training does not see who came before

    def __init__(self, expert_gate: Student | None = None, mora: MoRAConfig | None = None) -> None:
        self._gate: Student = expert_gate or ClosedFormGate()
        self._mora = mora or MoRAConfig()
        self.ranks = MoRARanks(self._mora, self._mora.cut)

    @property
    def parameters(self) -> int:
        """Of the expert-level gate."""
        return self._gate.parameters

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The expert-level gate's."""
        return self._gate.decide(stem, scene)

    def company(self, stage: Stage, lesson: Lesson) -> Among:
        """Nobody, under MoRA without the cut."""
        del lesson
        return Among(replace(stage, slots={}), MoRARanks(self._mora, cut=0.0))

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """The expert-level gate's."""
        self._gate.learn(stage, lesson)

    def state(self) -> dict[str, Tensor]:
        """The expert-level gate's."""
        return self._gate.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The expert-level gate's."""
        self._gate.restore(state)
