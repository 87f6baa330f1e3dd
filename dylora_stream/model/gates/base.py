"""What a gate is, and the gate that never opens: the bare backbone, the baseline of every other one."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dylora_stream.core.routing import Routing, to_backbone
from dylora_stream.core.statistics import LinearDiscriminant
from dylora_stream.model.mixture import StemOutput
from dylora_stream.model.network import RouterNetwork

__all__ = ["BackboneGate", "Gate", "Scene"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The experts that stand ready for a batch of B rows; their order is the registry's."""

    allowed: np.ndarray  # (B, E) bool, False for other tenants' experts
    is_beyond: np.ndarray  # (B,) bool, rows outside of every expert
    is_mature: np.ndarray  # (E,) bool
    discriminant: LinearDiscriminant | None  # None without experts
    network: RouterNetwork | None  # None before it was trained


class Gate(Protocol):
    """A method of routing. Decides from the stem alone, before any expert has run; changes nothing."""

    name: str

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Experts and weights of every row."""


class BackboneGate:
    """g = 0: no expert ever."""

    name = "base"

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Every row to the backbone."""
        del scene
        return to_backbone(len(stem.mask))
