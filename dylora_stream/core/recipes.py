"""How an expert is trained: the recipe, and the learning rate at each step.

Two schedules:
- `wsd`, warm-up, stable, decay (2404.06395): linear warm-up, a plateau, a decay over the last share of the steps.
  Against the paper: the decay is linear and ends one step above zero, so that the last step still moves.
- `cyclical`: cosine restarts (SGDR, 1608.03983) of equal length between the rate and its floor, after a linear warm-up.
"""

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["CONSOLIDATION", "SEEDING", "Recipe", "rate_at", "steps_of"]

Schedule = Literal["wsd", "cyclical"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The knobs of one training."""

    schedule: Schedule = "wsd"
    """wsd or cyclical."""
    rate: float = 1e-3
    """Highest learning rate. An isolated expert wants 1e-3: at 1e-4 small skills are not learned."""
    epochs: int = 6
    """Passes over the rows."""
    batch_size: int = 8
    """Rows a step."""
    warmup_share: float = 0.05
    """Share of the steps with a rising rate, 0..1."""
    decay_share: float = 0.2
    """Share of the steps with a falling rate at the end (wsd), 0..1; under 0.1 is short."""
    cycles: int = 3
    """Restarts (cyclical)."""
    floor_share: float = 0.05
    """Lowest rate of a cycle as a share of the highest (cyclical), 0..1."""
    weight_decay: float = 0.0
    """AdamW's; few steps leave it little to do."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; the first steps on a new skill are steep."""
    loraplus_ratio: float = 1.0
    """B's rate over A's (LoRA+, 2402.12354); 1 is plain LoRA."""
    rank: int = 8
    """Rank of an expert's first version, which later ones keep; 8 on all linear layers above the stem is 0.85 % of
    SmolLM2-135M, 4 is 0.42 %."""
    alpha: float = 16.0
    """Scale of the update is alpha / rank."""
    max_row_tokens: int = 1024
    """Tokens of a row, answer included; longer rows are left out of training and check."""

    def __post_init__(self) -> None:
        if self.schedule not in ("wsd", "cyclical"):
            raise ValueError(f"schedule is {self.schedule!r}: use wsd or cyclical")
        for name in ("rate", "clip_norm", "loraplus_ratio", "alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("epochs", "batch_size", "cycles", "rank", "max_row_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("warmup_share", "decay_share", "floor_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1")
        if self.warmup_share + self.decay_share > 1:
            raise ValueError("warmup_share and decay_share together exceed 1: no steps are left between them")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}: it must not be negative")


# Batches of 4: few rows want steps more than smooth ones. Four generative skills of 40 rows, two seeds, above a stem of
# 16 layers: 88.4 exactly right, with batches of 8 83.9, and 86.3 with 7 epochs of them in more time; six tasks of 48
# rows 66.0 and 65.7; four tasks of 16 rows 49.1 and 42.8 (above 8 layers).
SEEDING = Recipe(rate=2e-3, epochs=5, batch_size=4, warmup_share=0.1, decay_share=0.4)
CONSOLIDATION = Recipe(rate=5e-4, epochs=3, decay_share=0.1)


def steps_of(rows: int, recipe: Recipe) -> int:
    """Steps of a training over so many rows."""
    return recipe.epochs * math.ceil(rows / recipe.batch_size)


def rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of step 0 … steps-1."""
    warmup = round(recipe.warmup_share * steps)
    if step < warmup:
        return recipe.rate * (step + 1) / warmup
    if recipe.schedule == "wsd":
        return _stable_decay(step, steps, recipe)
    return _cosine_restart(step - warmup, steps - warmup, recipe)


def _stable_decay(step: int, steps: int, recipe: Recipe) -> float:
    """rate · min(1, (steps - step) / (decay + 1)): the last step still moves."""
    decay = round(recipe.decay_share * steps)
    return recipe.rate * min(1.0, (steps - step) / (decay + 1))


def _cosine_restart(step: int, steps: int, recipe: Recipe) -> float:
    """floor + (rate - floor) · (1 + cos(π · phase)) / 2, with phase running 0 → 1 in every cycle."""
    floor = recipe.rate * recipe.floor_share
    phase = (step * recipe.cycles / steps) % 1.0
    return floor + (recipe.rate - floor) * (1 + math.cos(math.pi * phase)) / 2
