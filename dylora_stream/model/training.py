"""Training one expert on a frozen backbone.

Three savings, none of which changes the result: logits are computed at answer positions only; the stem's output of a
row is computed once and kept (where that is proved equal on a batch, else every pass is whole); the backbone's weights
take no gradient. A fourth rounds differently: how attention is computed (`attention`). Same rows, recipe, seed and
thread count give the same bits.

An expert trains alone, or in company: among experts that stand already, as methods ask for whose experts share rows
while they learn (the sum of O-LoRA, the competing ranks of MoRAM).

Invariant: the backbone's weights are bit-identical afterwards, and no hook stays behind.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dylora_stream.core.errors import RowsUnlearnable
from dylora_stream.core.recipes import Recipe, rate_at, steps_of
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone, Tokens, linear_shape
from dylora_stream.model.features import (
    LabelledText,
    answer_batches,
    longest_row,
    split_by_tokens,
)
from dylora_stream.model.stem_cache import StemCache
from dylora_stream.model.tokenised import TokenRow, padded, tokenised

__all__ = [
    "STEP_ANSWER_TOKENS", "Company", "RowScores", "Trained", "TrainingOptions", "attached", "fitting", "score_rows",
    "train_expert",
]  # fmt: skip

SORT_WINDOW = 4  # batches that are length-sorted together: little padding, and still a new order each epoch
SCORE_BATCH = 16  # rows of one scoring pass
STEP_ANSWER_TOKENS = 512  # of one pass of a step: 1 GB over a vocabulary of 49,000, gradients included

Progress = Callable[[int, int, float], None]
Gate = Callable[[list[int], Tokens], AbstractContextManager[Any]]
Pairs = Mapping[str, tuple[Tensor, Tensor]]


class Company(Protocol):
    """Whom a new expert trains among, and what is trained with it."""

    trains_a: bool
    """Whether A moves; FlyLoRA's stays as it was drawn."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """What moves beside the pairs, at the recipe's rate."""

    def joined(self, pairs: Pairs, scale: float) -> AbstractContextManager[None]:
        """Around the whole training: within, the pairs take part in every pass."""

    def batch(self, tokens: Tokens) -> AbstractContextManager[None]:
        """Around the forward pass of a step: sets the gates."""

    def penalty(self, pairs: Pairs) -> Tensor | None:
        """Added to a step's loss."""

    def stepped(self) -> None:
        """Called after each step; biases that move by a rule move here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How a training runs, beside its recipe."""

    seed: int
    """Of A's values and the order of rows."""
    start: Adapter | None = None
    """The version to train on from; None starts from nothing."""
    progress: Progress | None = None
    """Called with (step, steps, loss) after each step."""
    may_cache_stem: bool = True
    """Keep the stem's output of each row, where that is proved equal."""
    company: Company | None = None
    """None: the expert trains alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """An adapter and how it came about. `losses`: one a step, mean over the batch's answer tokens."""

    adapter: Adapter
    losses: tuple[float, ...]
    rows: int
    seconds: float
    is_stem_cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    """How well right answers are predicted. All (n,): mean loss a token, and whether greedy decoding would give exactly
    the answer (every token is the likeliest one given the right ones before it)."""

    losses: np.ndarray
    is_exact: np.ndarray


def fitting(backbone: Backbone, rows: Sequence[LabelledText], recipe: Recipe) -> list[LabelledText]:
    """Rows that are trained on: answer included, within the recipe's tokens and the model's positions.

    One at a time: the tokens of a megabyte take many times its memory, and such a row is left out.
    """
    most = min(recipe.max_row_tokens, longest_row(backbone))
    return [row for row in rows if len(tokenised(backbone, [row])[0]) <= most]


def train_expert(
    backbone: Backbone,
    rows: Sequence[LabelledText],
    recipe: Recipe,
    options: TrainingOptions,
) -> Trained:
    """Train an expert from nothing, or on from an earlier version.

    Raises RowsUnlearnable when no row is usable, or the loss stops being a number.
    """
    usable = tokenised(backbone, fitting(backbone, rows, recipe))
    if not usable:
        raise RowsUnlearnable(f"none of {len(rows)} rows is within {recipe.max_row_tokens} tokens")
    began = time.perf_counter()
    order = np.random.default_rng(options.seed)
    pairs, scale = _initial(backbone, recipe, options)
    company = options.company
    optimizer = _optimizer(pairs, recipe, company)
    steps = steps_of(len(usable), recipe)
    losses: list[float] = []
    depth = backbone.read_layers if company else backbone.stem_layers  # a company's gates may read the rows
    stem = StemCache.proved(backbone, usable, depth) if options.may_cache_stem else None
    joined = company.joined(pairs, scale) if company else attached(backbone, pairs, scale)
    lesson = _Lesson(backbone, usable, pairs, company, stem)
    with joined, stem or nullcontext(), torch.enable_grad():
        for chosen in _batches(usable, recipe, order):
            _set_rate(optimizer, rate_at(len(losses), steps, recipe), recipe)
            optimizer.zero_grad(set_to_none=True)
            losses.append(lesson.gradients(chosen))
            _update(optimizer, recipe)
            if company is not None:
                company.stepped()
            if options.progress is not None:
                options.progress(len(losses), steps, losses[-1])
    if not np.isfinite(losses).all():
        raise RowsUnlearnable(
            f"the loss was lost after {int(np.isfinite(losses).sum())} of {steps} steps: lower the rate"
        )
    adapter = _adapter(pairs, scale)
    seconds = time.perf_counter() - began
    return Trained(
        adapter=adapter,
        losses=tuple(losses),
        rows=len(usable),
        seconds=seconds,
        is_stem_cached=stem is not None,
    )


@torch.no_grad()
def score_rows(
    backbone: Backbone, rows: Sequence[LabelledText], adapter: Adapter | None = None, gate: Gate | None = None
) -> RowScores:
    """Losses and exactness of rows under the backbone, one adapter alone, or whatever `gate` sets up for a batch.

    Batches depend on the rows alone, so that two calls are comparable row by row in bfloat16 too. `gate(row numbers,
    tokens)` is entered around the forward pass of each batch.
    """
    texts = tokenised(backbone, rows)
    losses = np.zeros(len(rows), dtype=np.float32)
    is_exact = np.zeros(len(rows), dtype=bool)
    with attached(backbone, adapter.tensors if adapter else {}, 1.0):
        for chosen in answer_batches(
            [row.prompt for row in texts], [row.target for row in texts], SCORE_BATCH
        ):
            tokens = padded(backbone, [texts[row] for row in chosen])
            with gate(chosen, tokens) if gate else nullcontext():
                logits = backbone.answer_logits(tokens).float()
            ids, counts = tokens.answer_ids(), [len(texts[row].target) for row in chosen]
            each = nn.functional.cross_entropy(logits, ids, reduction="none").split(counts)
            hits = (logits.argmax(-1) == ids).split(counts)
            losses[chosen] = [float(part.mean()) for part in each]
            is_exact[chosen] = [bool(part.all()) for part in hits]
    return RowScores(losses=losses, is_exact=is_exact)


@contextmanager
def attached(backbone: Backbone, pairs: Pairs, scale: float) -> Iterator[None]:
    """Within: every named layer gives `output + scale · B A x`, in the backbone's dtype."""
    modules = backbone.upper_linears() if pairs else {}
    handles = [modules[name].register_forward_hook(_lora_hook(a, b, scale)) for name, (a, b) in pairs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lora_hook(a: Tensor, b: Tensor, scale: float) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        low = nn.functional.linear(x, a.to(x.device, x.dtype))  # (B, T, r)
        return output + nn.functional.linear(low, b.to(x.device, x.dtype) * scale)

    return add


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What stays the same from step to step."""

    backbone: Backbone
    rows: Sequence[TokenRow]
    pairs: Pairs
    company: Company | None
    stem: StemCache | None

    def gradients(self, chosen: list[int]) -> float:
        """Add the gradients of a step over these rows; its loss."""
        total = 0.0
        for part, share in self._passes(chosen):
            tokens = padded(self.backbone, [self.rows[row] for row in part])
            if self.stem is not None:
                self.stem.put(part, tokens)
            loss = self._loss(tokens) * share
            loss.backward()
            total += float(loss.detach())
        return total

    def _passes(self, chosen: list[int]) -> list[tuple[list[int], float]]:
        """A step's rows, as many to a pass as its answer tokens allow, and each pass's share of these.

        A company's gates and penalty are of the whole step: its rows stay together.
        """
        counts = [len(self.rows[row].target) for row in chosen]
        if self.company is not None or sum(counts) <= STEP_ANSWER_TOKENS:
            return [(chosen, 1.0)]
        parts = [[chosen[place] for place in part] for part in split_by_tokens(counts, STEP_ANSWER_TOKENS)]
        return [(part, sum(len(self.rows[row].target) for row in part) / sum(counts)) for part in parts]

    def _loss(self, tokens: Tokens) -> Tensor:
        """The mean loss of the batch's answer tokens, and the company's penalty."""
        with self.company.batch(tokens) if self.company else nullcontext():
            logits = self.backbone.answer_logits(tokens).float()
        loss = nn.functional.cross_entropy(logits, tokens.answer_ids())
        penalty = self.company.penalty(self.pairs) if self.company else None
        return loss if penalty is None else loss + penalty


def _initial(
    backbone: Backbone, recipe: Recipe, options: TrainingOptions
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Trainable pairs and their scale: A uniform in ±1/√d_in (Kaiming with a = √5, as PEFT) and B zero, or a copy."""
    start = options.start
    scale = recipe.alpha / (start.rank if start is not None else recipe.rank)
    generator = torch.Generator().manual_seed(options.seed)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    if start is not None:
        # B is kept without its scale, so that a step moves it as far as it did in the first training.
        pairs = {name: (a.clone(), b / scale) for name, (a, b) in start.tensors.items()}
    else:
        for name, module in backbone.upper_linears().items():
            d_in, d_out = linear_shape(module)
            a = (torch.rand((recipe.rank, d_in), generator=generator) * 2 - 1) * d_in**-0.5
            pairs[name] = (a, torch.zeros((d_out, recipe.rank)))
    return {
        name: (nn.Parameter(a.to(backbone.device)), nn.Parameter(b.to(backbone.device)))
        for name, (a, b) in pairs.items()
    }, scale


def _optimizer(pairs: Pairs, recipe: Recipe, company: Company | None) -> torch.optim.AdamW:
    """Groups: A, B, and what the company trains beside them."""
    for a, _ in pairs.values():
        a.requires_grad_(company is None or company.trains_a)
    beside = list(company.parameters()) if company else []
    groups = [[a for a, _ in pairs.values()], [b for _, b in pairs.values()], *([beside] if beside else [])]
    return torch.optim.AdamW(
        [{"params": group} for group in groups],
        lr=recipe.rate,
        weight_decay=recipe.weight_decay,
        foreach=True,
    )


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, recipe: Recipe) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.param_groups[1]["lr"] = rate * recipe.loraplus_ratio


def _update(optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
    optimizer.step()


def _batches(rows: Sequence[TokenRow], recipe: Recipe, order: np.random.Generator) -> Iterator[list[int]]:
    """Every row once an epoch: shuffled, length-sorted within a few batches, the batches shuffled again."""
    window = recipe.batch_size * SORT_WINDOW
    for _ in range(recipe.epochs):
        shuffled = order.permutation(len(rows)).tolist()
        batches: list[list[int]] = []
        for begin in range(0, len(shuffled), window):
            part = sorted(shuffled[begin : begin + window], key=lambda row: len(rows[row]))
            batches += [part[at : at + recipe.batch_size] for at in range(0, len(part), recipe.batch_size)]
        for index in order.permutation(len(batches)):
            yield batches[index]


def _adapter(pairs: Pairs, scale: float) -> Adapter:
    tensors = {
        name: (a.detach().float().cpu().clone(), (b.detach() * scale).float().cpu())
        for name, (a, b) in pairs.items()
    }
    return Adapter(rank=next(iter(tensors.values()))[0].shape[0], tensors=tensors)
