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
from typing import Any, Protocol, Self

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
    length_sorted,
    longest_row,
    split_by_tokens,
    states_behind,
)

__all__ = [
    "Company", "RowScores", "Trained", "TrainingOptions", "attached", "fitting", "score_rows", "train_expert",
]  # fmt: skip

STEM_CACHE_BYTES = 512 * 2**20  # above this, recomputing costs less than the memory is worth
PROOF_ROWS = 2  # shortest rows, and as many longest ones: the proof is passes that train nothing
SORT_WINDOW = 4  # batches that are length-sorted together: little padding, and still a new order each epoch
SCORE_BATCH = 16  # rows of one scoring pass
STEP_ANSWER_TOKENS = (
    512  # of one pass of a step, 1 GB over a vocabulary of 49,000: its logits' gradients are kept too
)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    prompt: list[int]
    target: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def fitting(backbone: Backbone, rows: Sequence[LabelledText], recipe: Recipe) -> list[LabelledText]:
    """Rows that are trained on: answer included, within the recipe's tokens and the model's positions.

    One at a time: the tokens of a megabyte take many times its memory, and such a row is left out.
    """
    most = min(recipe.max_row_tokens, longest_row(backbone))
    return [row for row in rows if len(_tokenised(backbone, [row])[0]) <= most]


def train_expert(
    backbone: Backbone,
    rows: Sequence[LabelledText],
    recipe: Recipe,
    options: TrainingOptions,
) -> Trained:
    """Train an expert from nothing, or on from an earlier version.

    Raises RowsUnlearnable when no row is usable, or the loss stops being a number.
    """
    usable = _tokenised(backbone, fitting(backbone, rows, recipe))
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
    stem = _StemCache.proved(backbone, usable, depth) if options.may_cache_stem else None
    joined = company.joined(pairs, scale) if company else attached(backbone, pairs, scale)
    with joined, stem or nullcontext(), torch.enable_grad():
        for chosen in _batches(usable, recipe, order):
            _set_rate(optimizer, rate_at(len(losses), steps, recipe), recipe)
            optimizer.zero_grad(set_to_none=True)
            losses.append(0.0)
            for part, share in _passes(usable, chosen, company):
                tokens = _padded(backbone, [usable[row] for row in part])
                if stem is not None:
                    stem.put(part, tokens)
                loss = _loss(backbone, tokens, pairs, company) * share
                loss.backward()
                losses[-1] += float(loss.detach())
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
    tokenised = _tokenised(backbone, rows)
    losses = np.zeros(len(rows), dtype=np.float32)
    is_exact = np.zeros(len(rows), dtype=bool)
    with attached(backbone, adapter.tensors if adapter else {}, 1.0):
        for chosen in answer_batches(
            [row.prompt for row in tokenised], [row.target for row in tokenised], SCORE_BATCH
        ):
            tokens = _padded(backbone, [tokenised[row] for row in chosen])
            with gate(chosen, tokens) if gate else nullcontext():
                logits = backbone.answer_logits(tokens).float()
            ids, counts = tokens.answer_ids(), [len(tokenised[row].target) for row in chosen]
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


class _StemCache:
    """What the first layers give for every training row; within it, these hand that on instead of computing.

    The layers stay in their places with their attributes, only their `forward` is shadowed: embeddings, masks and
    position tables are the model's own, whatever its architecture.
    """

    def __init__(self, backbone: Backbone, depth: int, states: list[Tensor]) -> None:
        self._layers = list(backbone.layers)[:depth]
        self._states = states  # a row: (T, d)
        self._batch: Tensor | None = None

    @classmethod
    def proved(cls, backbone: Backbone, rows: Sequence[_Row], depth: int) -> "_StemCache | None":
        """A filled cache of the first `depth` layers, or None where it would be too large or not give the full pass's
        states."""
        size = sum(len(row) for row in rows) * backbone.width * backbone.dtype.itemsize
        by_length = sorted(rows, key=len)
        few = by_length[:PROOF_ROWS] + by_length[-PROOF_ROWS:]  # much padding, and the longest there is
        if size > STEM_CACHE_BYTES or not _replays(backbone, depth, _padded(backbone, few)):
            return None
        states: list[Tensor] = [torch.empty(0)] * len(rows)
        for chosen in length_sorted([len(row) for row in rows], SCORE_BATCH):
            tokens = _padded(backbone, [rows[row] for row in chosen])
            for row, state in zip(chosen, states_behind(backbone, depth, tokens), strict=True):
                states[row] = state[-len(rows[row]) :].clone()
        return cls(backbone, depth, states)

    def put(self, chosen: Sequence[int], tokens: Tokens) -> None:
        """The rows of the next forward pass, padded as `tokens` is."""
        batch = torch.zeros((*tokens.input_ids.shape, self._states[0].shape[-1]), dtype=self._states[0].dtype)
        batch = batch.to(tokens.input_ids.device)
        for place, row in enumerate(chosen):
            batch[place, -len(self._states[row]) :] = self._states[row]
        self._batch = batch

    def hand_on(self, batch: Tensor) -> None:
        """The states (B, T, d) of the next forward pass."""
        self._batch = batch

    def __enter__(self) -> Self:
        for layer in self._layers:
            layer.forward = lambda *_args, **_kwargs: self._batch
        return self

    def __exit__(self, *_error: object) -> None:
        for layer in self._layers:
            del layer.forward


@torch.no_grad()
def _replays(backbone: Backbone, depth: int, tokens: Tokens) -> bool:
    """Whether handing the first layers' output to those above gives the very states of the full pass."""
    needed = tokens.answer_positions()
    whole = backbone.body(**tokens.inputs(), use_cache=False)[0][needed]
    cache = _StemCache(backbone, depth, [])
    cache.hand_on(states_behind(backbone, depth, tokens))
    try:
        with cache:
            replayed = backbone.body(**tokens.inputs(), use_cache=False)[0][needed]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False  # layers that hand on more than states: every pass is whole
    return torch.equal(whole, replayed)


def _tokenised(backbone: Backbone, rows: Sequence[LabelledText]) -> list[_Row]:
    prompts = backbone.prompt_ids([row.input for row in rows])
    targets = backbone.target_ids([row.output for row in rows])
    return [_Row(prompt=prompt, target=target) for prompt, target in zip(prompts, targets, strict=True)]


def _padded(backbone: Backbone, rows: Sequence[_Row]) -> Tokens:
    return backbone.pad([row.prompt for row in rows], [row.target for row in rows])


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


def _loss(backbone: Backbone, tokens: Tokens, pairs: Pairs, company: Company | None) -> Tensor:
    """The mean loss of the batch's answer tokens, and the company's penalty."""
    with company.batch(tokens) if company else nullcontext():
        logits = backbone.answer_logits(tokens).float()
    loss = nn.functional.cross_entropy(logits, tokens.answer_ids())
    penalty = company.penalty(pairs) if company else None
    return loss if penalty is None else loss + penalty


def _update(optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
    optimizer.step()


def _batches(rows: Sequence[_Row], recipe: Recipe, order: np.random.Generator) -> Iterator[list[int]]:
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


def _passes(
    rows: Sequence[_Row], chosen: list[int], company: Company | None
) -> list[tuple[list[int], float]]:
    """A step's rows, as many to a pass as its answer tokens allow, and each pass's share of these.

    A company's gates and penalty are of the whole step: its rows stay together.
    """
    counts = [len(rows[row].target) for row in chosen]
    if company is not None or sum(counts) <= STEP_ANSWER_TOKENS:
        return [(chosen, 1.0)]
    parts = [[chosen[place] for place in part] for part in split_by_tokens(counts, STEP_ANSWER_TOKENS)]
    return [(part, sum(len(rows[row].target) for row in part) / sum(counts)) for part in parts]


def _adapter(pairs: Pairs, scale: float) -> Adapter:
    tensors = {
        name: (a.detach().float().cpu().clone(), (b.detach() * scale).float().cpu())
        for name, (a, b) in pairs.items()
    }
    return Adapter(rank=next(iter(tensors.values()))[0].shape[0], tensors=tensors)
