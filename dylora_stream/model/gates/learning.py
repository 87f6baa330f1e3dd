"""Learning a gate by the answers' loss on stored rows: a few steps through the pool, under the gate's own weights.

Each step takes rows of all experts in turn, so that every expert is heard as often as every other. The backbone and
all experts are frozen; gradients reach the gate's parameters through the weights that `gating` sets. A pass over 8 rows
costs seconds on a real backbone, so steps are few; what can be learned from stored stem features alone should be.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dylora_stream.core.errors import TrainingFailed
from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.features import LabelledText
from dylora_stream.model.gates.base import Lesson, Stage
from dylora_stream.model.mixture import RankGate
from dylora_stream.model.stem import StemOutput

__all__ = ["Gating", "Learning", "by_ranks", "by_stem", "learn_by_answers"]

Gating = Callable[[Tokens], AbstractContextManager[None]]
"""Around a forward pass of these rows: the gates are set, with gradients, and taken off afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """How a gate learns."""

    rate: float = 1e-2
    """AdamW's; columns start at zero and steps are few."""
    steps: int = 12
    """Each a forward and a backward pass."""
    rows: int = 8
    """Of a step."""
    decay: float = 1e-2
    """Weight decay."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""
    max_row_tokens: int = 512
    """Tokens of a row, answer included; longer rows are left out."""
    penalty: Callable[[], Tensor | None] | None = None
    """Added to a step's loss; called after the forward pass."""

    def __post_init__(self) -> None:
        for name in ("rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("steps", "rows", "max_row_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.decay < 0:
            raise ValueError(f"decay is {self.decay}: it must not be negative")


def learn_by_answers(
    stage: Stage, lesson: Lesson, gating: Gating, parameters: Sequence[Tensor], config: Learning
) -> None:
    """Move `parameters` (leaves, changed in place) down the answers' loss on rows of all experts that stand.

    They take gradients within and none afterwards. Without a usable row nothing moves. Raises TrainingFailed when the
    loss stops being a number.
    """
    batches = _batches(stage, lesson, config)
    optimizer = torch.optim.AdamW(parameters, lr=config.rate, weight_decay=config.decay)
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        with torch.enable_grad():
            for tokens in batches:
                _step(stage.backbone, tokens, gating, optimizer, config)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def by_ranks(stage: Stage, ranks: RankGate) -> Gating:
    """All experts that stand are members of every row, and `ranks` weighs them."""

    @contextmanager
    def gating(tokens: Tokens) -> Iterator[None]:
        members = torch.tensor(list(stage.slots.values())).expand(len(tokens.input_ids), -1)
        stage.pool.set_gates(members, torch.ones(members.shape), ranks)
        try:
            yield
        finally:
            stage.pool.no_gates()

    return gating


def by_stem(stage: Stage, decide: Callable[[StemOutput], None]) -> Gating:
    """`decide` is called where rows are read, with the prompts' states, and sets the pool's gates."""

    @contextmanager
    def gating(tokens: Tokens) -> Iterator[None]:
        try:
            with stage.hook.routing(tokens.prompt_mask(), decide):
                yield
        finally:
            stage.pool.no_gates()

    return gating


def _step(
    backbone: Backbone, tokens: Tokens, gating: Gating, optimizer: torch.optim.Optimizer, config: Learning
) -> None:
    with gating(tokens):
        logits = backbone.answer_logits(tokens).float()
    loss = nn.functional.cross_entropy(logits, tokens.answer_ids())
    penalty = config.penalty() if config.penalty else None
    loss = loss if penalty is None else loss + penalty
    if not torch.isfinite(loss):
        raise TrainingFailed("a gate's loss was lost: lower its rate")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], config.clip_norm
    )
    optimizer.step()


def _batches(stage: Stage, lesson: Lesson, config: Learning) -> list[Tokens]:
    """Batches of tokenised rows: experts take turns, each goes through its rows in a seeded order, again and again."""
    rng = np.random.default_rng(lesson.seed)
    needed = config.steps * config.rows
    rows = {
        expert_id: lesson.memory[expert_id].rows for expert_id in stage.slots if expert_id in lesson.memory
    }
    usable = {expert_id: _usable(stage.backbone, rows[expert_id], rng, config) for expert_id in rows}
    dealt = _dealt(usable, needed)
    batches = [dealt[start : start + config.rows] for start in range(0, len(dealt), config.rows)]
    return [stage.backbone.pad([p for p, _ in batch], [t for _, t in batch]) for batch in batches]


Row = tuple[list[int], list[int]]  # prompt and target ids


def _usable(
    backbone: Backbone, rows: Sequence[LabelledText], rng: np.random.Generator, config: Learning
) -> list[Row]:
    """Tokenised rows within the limit, shuffled; no more are read than one lesson can use."""
    chosen = [rows[row] for row in rng.permutation(len(rows))[: config.steps * config.rows]]
    prompts = backbone.prompt_ids([row.input for row in chosen])
    targets = backbone.target_ids([row.output for row in chosen])
    both = list(zip(prompts, targets, strict=True))
    return [row for row in both if len(row[0]) + len(row[1]) <= config.max_row_tokens]


def _dealt(usable: Mapping[str, list[Row]], needed: int) -> list[Row]:
    """Rows of the experts in turn."""
    piles = [pile for pile in usable.values() if pile]
    if not piles:
        return []
    return [
        piles[turn % len(piles)][turn // len(piles) % len(piles[turn % len(piles)])] for turn in range(needed)
    ]
