"""What a gate is, what it learns from, and the gate that never opens: the bare backbone, every other one's baseline.

A method of the field is a gate over rank blocks, `y = W x + Σ_b g_b(x) B_b A_b x`, in up to four parts:

- `decide`: experts and weights of a row, from the stem (every gate);
- `ranks`: weights of single ranks inside these experts, a token and layer (MoRA and its kind; else None);
- `learn`: what is fitted when a new expert stands in its slot (closed forms update, networks take gradient steps);
- `company`: whom a new expert trains among (None: alone, so that methods can share such experts).

`decide` and `weigh` change nothing; `learn`, and a training in the gate's company, do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from dylora_stream.core.routing import Routing, to_backbone
from dylora_stream.core.statistics import LinearDiscriminant
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText
from dylora_stream.model.mixture import Pool, RankGate
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.stem import StemHook, StemOutput
from dylora_stream.model.training import Company

__all__ = ["BackboneGate", "Gate", "Lesson", "Memory", "Scene", "Stage", "Student", "Untrained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The experts that stand ready for a batch of B rows; their order is the registry's."""

    allowed: np.ndarray  # (B, E) bool, False for other tenants' experts
    is_beyond: np.ndarray  # (B,) bool, rows outside of every expert
    is_mature: np.ndarray  # (E,) bool
    discriminant: LinearDiscriminant | None  # None without experts
    network: RouterNetwork | None  # None before it was trained
    expert_ids: tuple[str, ...] = ()  # of the E experts


class Gate(Protocol):
    """A method's side of serving. Decides from the stem alone, before any expert has run; changes nothing."""

    name: str

    @property
    def ranks(self) -> RankGate | None:
        """What weighs ranks inside the experts; None: rows alone are weighed."""

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Experts and weights of every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where a gate learns: backbone and pool, with the experts of `slots` (id → slot, in the order they came)."""

    backbone: Backbone
    pool: Pool
    hook: StemHook
    slots: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Stored rows of one expert, and their stem features (n, d) float32."""

    rows: Sequence[LabelledText]
    features: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A new expert, and what is stored of all experts, in the order they came, the new one last."""

    expert_id: str
    memory: Mapping[str, Memory]
    seed: int

    @property
    def own(self) -> Memory:
        """The new expert's."""
        return self.memory[self.expert_id]


class Student(Gate, Protocol):
    """A gate's side of learning. For each new expert: `company` → its training → its slot is written → `learn`."""

    @property
    def parameters(self) -> int:
        """Trained numbers of the gate itself, the experts' not counted."""

    def company(self, stage: Stage, lesson: Lesson) -> Company | None:
        """Whom the new expert trains among; it is not in `stage.slots` yet. None: alone."""

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """Fit the gate, the new expert in its slot. Old routes must not be forgotten."""

    def state(self) -> dict[str, Tensor]:
        """Everything learned so far, for `restore`."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; decides as the gate that gave it, bit for bit."""


class Untrained:
    """The learning side of a gate without parameters, whose experts train alone."""

    ranks: RankGate | None = None

    @property
    def parameters(self) -> int:
        """None."""
        return 0

    def company(self, stage: Stage, lesson: Lesson) -> Company | None:
        """None: alone."""
        del stage, lesson
        return None

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """Nothing."""

    def state(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


class BackboneGate(Untrained):
    """g = 0: no expert ever."""

    name = "base"

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Every row to the backbone."""
        del scene
        return to_backbone(len(stem.mask))
