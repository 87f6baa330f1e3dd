"""The experts' blocks, and the sum of them that a forward pass adds to every adapted layer.

Every adapted linear layer gives `W x + Σ g·B A x`. A's and B's lie in preallocated slots; slot 0 is the backbone and is
skipped. Two ways to compute the sum, both with two products and the same result:

- shared: the blocks of the distinct experts of a batch stand beside each other in one matrix, and every row scales each
  expert's part by its gate, 0 for most. Best for few experts, and while decoding, where a pass has few tokens.
- gathered: each row gathers its own blocks (`bmm`, `baddbmm`). Its cost does not grow with the experts in a batch.

Layers that read the same tensor share one product with all their A: small products cost what starting them costs.
Blocks are gathered when a pass first needs them and kept until the gates change, so decoding gathers once.

A gate may weigh single ranks as well, a row (weights (B, m, r)) or a token and layer (a `RankGate`, asked in the middle
of every adapted layer). A young expert, whose A and B are still being trained, stands beside the pool's as
YOUNG_SLOT: an expert that learns among others is computed by the very code that will serve it.

Invariant: a row whose members are all slot 0 gets the base output bit for bit; a batch of such rows costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.blocks import BACKBONE_SLOT, Blocks, Group
from dylora_stream.model.config import PoolConfig

__all__ = ["BACKBONE_SLOT", "YOUNG_SLOT", "LayerView", "Pairs", "Pool", "RankGate"]

YOUNG_SLOT = -1  # the expert that is being trained
# Distinct experts in a batch, for each member of a row, up to which the shared way is faster.
SHARED_EXPERTS = 4
SHARED_EXPERTS_DECODING = 32  # where a row has a single token


Pairs = Mapping[str, tuple[Tensor, Tensor]]  # layer name → A (r, d_in), B (d_out, r)


@dataclass(frozen=True, slots=True)
class LayerView:
    """One adapted layer in the middle of a pass, as a rank gate sees it."""

    layer: str
    inputs: Tensor  # (B, T, d_in) x
    low: Tensor  # (B, T, D, r) A x of the distinct experts
    slots: Tensor  # (D,) int64 of the distinct experts
    shares: Tensor  # (B, D) float32, 0 where an expert is not a member of the row
    states: Tensor  # (B, T, d) the stem's output in this pass


class RankGate(Protocol):
    """Weighs ranks, a token and layer."""

    def weigh(self, view: LayerView) -> Tensor:
        """Weights that broadcast to (B, T, D, r); they multiply the rows' shares."""


@dataclass(frozen=True, slots=True)
class _Gates:
    """Who answers each row. `shares` (B, D) or (B, D, r) over the distinct slots; `slots`, `weights` row by row."""

    distinct: Tensor  # (D,) int64
    shares: Tensor  # (B, D) or (B, D, r) float32
    slots: Tensor  # (B, m) int64
    weights: Tensor  # (B, m) or (B, m, r) float32
    shared_experts: tuple[
        int, int
    ]  # distinct experts up to which the shared way is taken: one token a row, more
    ranks: RankGate | None = None

    def is_shared(self, tokens: int) -> bool:
        """Which way a pass of so many tokens a row is computed."""
        return len(self.distinct) <= self.shared_experts[tokens > 1]

    def rows(self, index: Tensor) -> "_Gates":
        return replace(self, shares=self.shares[index], slots=self.slots[index], weights=self.weights[index])


@dataclass(slots=True)
class _Kept:
    """What a pass computes once for as long as the gates stay."""

    blocks: dict[tuple[Group | str, bool], Tensor] = field(default_factory=dict)
    scales: dict[tuple[int, bool], Tensor | None] = field(default_factory=dict)
    read: Tensor | None = None  # what the last layers read, and their common product
    low: Tensor = field(default_factory=lambda: torch.empty(0))

    def shared(self) -> "_Kept":
        """The blocks that any rows of the batch can go on with."""
        return _Kept(blocks={key: blocks for key, blocks in self.blocks.items() if key[1]})


class Pool:
    """The experts' blocks, and the forward hooks that add them. Not thread-safe but for `fill`."""

    def __init__(self, backbone: Backbone, config: PoolConfig) -> None:
        self._config = config
        self._device, self._dtype = backbone.device, backbone.dtype
        self._blocks = Blocks(backbone, config)
        self._gates: _Gates | None = None
        self._kept = _Kept()
        self._young: tuple[Pairs, float] | None = None
        self._states = torch.empty(0)
        self._handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in backbone.upper_linears().items()
        ]
        first = backbone.layers[backbone.stem_layers]
        self._handles.append(first.register_forward_pre_hook(self._keep_states, with_kwargs=True))

    @property
    def slots(self) -> int:
        """Places for experts; their numbers are 1 … slots."""
        return self._config.slots

    @property
    def rank(self) -> int:
        """Ranks of a slot."""
        return self._config.rank

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Adapted layer → (d_in, d_out), in the model's order."""
        return self._blocks.shapes

    def blocks(self, slot: int, layer: str) -> tuple[Tensor, Tensor]:
        """(A (r, d_in), B (d_out, r)) of a slot, views of the pool, or of the young expert, its scale within B."""
        if slot != YOUNG_SLOT:
            return self._blocks.of(slot, layer)
        if self._young is None:
            raise ValueError("no expert is being trained")
        pairs, scale = self._young
        a, b = pairs[layer]
        return a, b * scale

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot; layers it does not name get none. Raises ModelMismatch before it writes."""
        self.no_gates()
        self.fill(slot, adapter)

    def fill(self, slot: int, adapter: Adapter) -> None:
        """`write` for a slot that nobody answers from: gates stay, and a pass may be under way."""
        self._blocks.write(slot, adapter)

    def check(self, adapter: Adapter) -> None:
        """Whether an adapter fits this backbone and the pool's rank; raises ModelMismatch with what does not."""
        self._blocks.check(adapter)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.no_gates()
        self._blocks.clear(slot)

    @contextmanager
    def training(self, pairs: Pairs, scale: float) -> Iterator[None]:
        """Within: YOUNG_SLOT is these pairs of the pool's rank, with gradients; `scale` multiplies B A x."""
        self._young = (pairs, scale)
        try:
            yield
        finally:
            self._young = None
            self.no_gates()

    def set_gates(self, slots: Tensor, weights: Tensor, ranks: RankGate | None = None) -> None:
        """From now on row i of a batch is answered by `slots` (B, m) int64 with `weights` (B, m) or (B, m, r) float32.

        Weights may carry gradients. The backbone's share is whatever the members of slot 0 have: it adds nothing.
        `ranks` weighs the ranks of the members token by token.
        """
        slots = slots.cpu()
        is_expert = slots != BACKBONE_SLOT
        if not weights.requires_grad:
            has_weight = weights.detach().cpu() != 0
            is_expert &= has_weight.any(-1) if weights.ndim > slots.ndim else has_weight
        self._set(None)
        if not is_expert.any():
            return
        members = int(is_expert.sum(1).max())
        front = (~is_expert).int().argsort(dim=1, stable=True)[:, :members]  # members with blocks first
        slots = torch.where(is_expert, slots, BACKBONE_SLOT).gather(1, front)
        weights = _chosen(weights.to(self._device), is_expert.to(self._device), front.to(self._device))
        distinct = slots[slots != BACKBONE_SLOT].unique()
        member = (slots[:, :, None] == distinct).to(self._device)  # (B, m, D)
        shares = torch.einsum("bm...,bmd->bd...", weights, member.to(weights.dtype))
        must_share = ranks is not None or weights.ndim > slots.ndim or self._young is not None
        limits = self._shared_experts(members, len(distinct) if must_share else 0)
        self._set(_Gates(distinct.to(self._device), shares, slots.to(self._device), weights, limits, ranks))

    def keep_rows(self, index: Tensor) -> None:
        """Go on with these rows of the batch, in this order, repeats allowed: index (B',) int64."""
        if self._gates is not None:
            self._gates, self._kept = self._gates.rows(index), self._kept.shared()

    @contextmanager
    def rows(self, index: Tensor) -> Iterator[None]:
        """Within: `keep_rows`; afterwards the gates as they were."""
        before = (self._gates, self._kept)
        self.keep_rows(index)
        try:
            yield
        finally:  # the rows' own blocks were gathered where those of the batch lay
            self._gates, self._kept = before[0], before[1].shared()

    def no_gates(self) -> None:
        """From now on the bare backbone answers."""
        self._set(None)

    @contextmanager
    def gated(self, slots: Tensor, weights: Tensor) -> Iterator[None]:
        """Within: `set_gates`; afterwards the bare backbone."""
        self.set_gates(slots, weights)
        try:
            yield
        finally:
            self.no_gates()

    def close(self) -> None:
        """Take the hooks off the model. May be called twice."""
        for handle in self._handles:
            handle.remove()

    def _set(self, gates: _Gates | None) -> None:
        self._gates, self._kept = gates, _Kept()

    def _shared_experts(self, members: int, least: int) -> tuple[int, int]:
        """Of rows of one token, and of more."""
        return max(SHARED_EXPERTS_DECODING * members, least), max(SHARED_EXPERTS * members, least)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return None if self._gates is None else self._added(name, args[0], output, self._gates)

        return add

    def _added(self, name: str, x: Tensor, output: Tensor, gates: _Gates) -> Tensor:
        shape, rows = output.shape, len(gates.slots)
        inputs = x.reshape(rows, -1, x.shape[-1])  # some models flatten (B·T, d)
        is_shared = gates.is_shared(inputs.shape[1])
        low, b = self._low(name, x, inputs, gates), self._chosen_b(name, gates, is_shared=is_shared)
        may_write = not (
            output.requires_grad or low.requires_grad
        )  # nobody else has the output yet: a quarter less
        if is_shared:
            whole, low = output.reshape(-1, shape[-1]), low.reshape(-1, low.shape[-1])
            whole = whole.addmm_(low, b) if may_write else torch.addmm(whole, low, b)
        else:
            whole = output.reshape(rows, -1, shape[-1])
            whole = whole.baddbmm_(low, b) if may_write else torch.baddbmm(whole, low, b)
        return whole.view(shape)

    def _low(self, name: str, x: Tensor, inputs: Tensor, gates: _Gates) -> Tensor:
        """(B, T, n·r): g · A x of a layer, cut out of its group's common product."""
        group = self._blocks.groups[name]
        is_shared = gates.is_shared(inputs.shape[1])
        if self._kept.read is not x:
            self._kept.read, self._kept.low = x, self._product(group, inputs, gates)
        low = self._cut(self._kept.low, group, name, is_shared=is_shared)
        if gates.ranks is None:
            return low
        low = self._weighed(name, inputs, low, gates, gates.ranks)
        scale = self._scale(gates, 1, is_shared=True)
        return low if scale is None else low * scale

    def _cut(self, low: Tensor, group: Group, name: str, *, is_shared: bool) -> Tensor:
        """One layer's part of a group's product: the group's layers lie outermost if shared, else within a member."""
        place, width = group.index(name), low.shape[-1] // len(group)
        if is_shared or width == self._config.rank:
            return low[..., place * width : (place + 1) * width]
        members = low.unflatten(-1, (-1, len(group), self._config.rank))
        return members[..., place, :].flatten(-2)

    def _product(self, group: Group, inputs: Tensor, gates: _Gates) -> Tensor:
        """(B, T, layers·n·r): A x of layers that read the same tensor, times the gates unless ranks come between."""
        is_shared = gates.is_shared(inputs.shape[1])
        a = self._chosen_a(group, gates, is_shared=is_shared)
        low = nn.functional.linear(inputs, a) if is_shared else torch.bmm(inputs, a.transpose(1, 2))
        scale = None if gates.ranks else self._scale(gates, len(group), is_shared=is_shared)
        return low if scale is None else low * scale

    def _scale(self, gates: _Gates, layers: int, *, is_shared: bool) -> Tensor | None:
        """(B, 1, layers·n·r) in the backbone's type and in the order of `_cut`; None where it is 1 everywhere."""
        key = (layers, is_shared)
        if key not in self._kept.scales:
            share = gates.shares if is_shared else gates.weights
            is_one = not share.requires_grad and bool((share == 1).all())
            each = share if share.ndim == 3 else share[:, :, None].expand(-1, -1, self._config.rank)
            if is_shared:
                whole = each.to(self._dtype).flatten(1).repeat(1, layers)[:, None]
            else:
                whole = each.to(self._dtype).repeat(1, 1, layers).flatten(1)[:, None]
            self._kept.scales[key] = None if is_one else whole
        return self._kept.scales[key]

    def _weighed(self, name: str, x: Tensor, low: Tensor, gates: _Gates, ranks: RankGate) -> Tensor:
        apart = low.view(*low.shape[:-1], len(gates.distinct), self._config.rank)  # (B, T, D, r)
        view = LayerView(name, x, apart, gates.distinct, gates.shares, self._states)
        return (apart * ranks.weigh(view).to(low.dtype)).view(low.shape)

    def _chosen_a(self, group: Group, gates: _Gates, *, is_shared: bool) -> Tensor:
        """Blocks of A of a group's layers: (layers·D·r, d), or row by row (B, m·layers·r, d)."""
        kept = self._kept.blocks
        if (group, is_shared) not in kept:
            if self._young is not None:
                parts = [self._with_young(name, gates, 0).flatten(0, 1) for name in group]
                kept[group, is_shared] = torch.cat(parts)
            elif is_shared:
                kept[group, is_shared] = self._blocks.batch_a(group, gates.distinct)
            else:
                kept[group, is_shared] = self._blocks.row_a(group, gates.slots)
        return kept[group, is_shared]

    def _chosen_b(self, name: str, gates: _Gates, *, is_shared: bool) -> Tensor:
        """Blocks of B of a layer: (D·r, d), or row by row (B, m·r, d)."""
        kept = self._kept.blocks
        if (name, is_shared) not in kept:
            if self._young is not None:
                kept[name, is_shared] = self._with_young(name, gates, 1).transpose(1, 2).flatten(0, 1)
            elif is_shared:
                kept[name, is_shared] = self._blocks.batch_b(name, gates.distinct)
            else:
                kept[name, is_shared] = self._blocks.row_b(name, gates.slots)
        return kept[name, is_shared]

    def _with_young(self, name: str, gates: _Gates, half: int) -> Tensor:
        """(D, …) A's or B's of the distinct experts, the young one among them, in the backbone's type."""
        return torch.stack(
            [self.blocks(slot, name)[half].to(self._dtype) for slot in gates.distinct.tolist()]
        )

    def _keep_states(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._states = args[0] if args else kwargs["hidden_states"]


def _chosen(weights: Tensor, is_expert: Tensor, front: Tensor) -> Tensor:
    """Weights of the members at `front` (B, m'), 0 where they are no experts; (B, m') or (B, m', r)."""
    if weights.ndim == 2:
        return torch.where(is_expert, weights, 0.0).gather(1, front)
    kept = torch.where(is_expert[:, :, None], weights, 0.0)
    return kept.gather(1, front[:, :, None].expand(-1, -1, weights.shape[2]))
