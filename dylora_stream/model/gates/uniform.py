"""The sum of all experts, g = 1 (IncLoRA): each new expert trains on top of the frozen sum of the old ones.

With `orthogonality` above 0 it is O-LoRA (2310.14152): λ · Σ_layers Σ_old |A_old A_newᵀ|₁ is added to the loss, which
keeps the new expert's input directions away from the old ones'. Serving is the same. Against the paper: λ acts on the
mean over layers' sums, not on their sum, so that one value serves backbones of any depth; the L2 term on the new
weights is left out (the recipe's weight decay is there for it).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing
from dylora_stream.model.backbone import Tokens
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Untrained
from dylora_stream.model.gates.rows import everyone
from dylora_stream.model.mixture import YOUNG_SLOT, Pairs, RankGate
from dylora_stream.model.stem import StemOutput

__all__ = ["Among", "SumGate"]

ORTHOGONALITY = 0.5  # O-LoRA's λ of its first tasks


class Among:
    """A `training.Company`: every row goes to the young expert and all old ones with weight 1, the old ones frozen."""

    trains_a = True

    def __init__(self, stage: Stage, ranks: RankGate | None = None) -> None:
        self._pool, self._ranks = stage.pool, ranks
        self._members = torch.tensor([*stage.slots.values(), YOUNG_SLOT])

    def parameters(self) -> Sequence[nn.Parameter]:
        """Nothing beside the pairs."""
        return []

    @contextmanager
    def joined(self, pairs: Pairs, scale: float) -> Iterator[None]:
        """The pool holds the young expert."""
        with self._pool.training(pairs, scale):
            yield

    @contextmanager
    def batch(self, tokens: Tokens) -> Iterator[None]:
        """Everyone answers every row."""
        members = self._members.expand(len(tokens.input_ids), -1)
        self._pool.set_gates(members, torch.ones(members.shape), self._ranks)
        yield

    def penalty(self, pairs: Pairs) -> Tensor | None:
        """None."""
        del pairs
        return None

    def stepped(self) -> None:
        """Nothing moves by a rule."""


class _Orthogonal(Among):
    """With O-LoRA's penalty."""

    def __init__(self, stage: Stage, weight: float) -> None:
        super().__init__(stage)
        self._weight, self._slots = weight, list(stage.slots.values())

    def penalty(self, pairs: Pairs) -> Tensor | None:
        if not self._slots:
            return None
        overlaps = [
            (a @ self._pool.blocks(slot, layer)[0].to(a.dtype).t()).abs().sum()
            for layer, (a, _) in pairs.items()
            for slot in self._slots
        ]
        return self._weight * torch.stack(overlaps).sum() / len(pairs)


class SumGate(Untrained):
    """IncLoRA, or with `orthogonality` O-LoRA."""

    def __init__(self, orthogonality: float = 0.0) -> None:
        self.name = "olora" if orthogonality else "sum"
        self._orthogonality = orthogonality

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Everyone, weight 1."""
        del stem
        return everyone(scene)

    def company(self, stage: Stage, lesson: Lesson) -> Among | None:
        """The sum of the old experts; the first expert is alone."""
        del lesson
        if not stage.slots:
            return None
        return _Orthogonal(stage, self._orthogonality) if self._orthogonality else Among(stage)
