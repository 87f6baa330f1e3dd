"""Experts in one forward pass: the pool of their blocks, and the hook at the stem's end that sets who answers a row.

Every adapted linear layer gives `W x + Σ g·B A x`. A's and B's lie in preallocated slots; slot 0 is the backbone and is
skipped. Two ways to compute the sum, both with two products and the same result:

- shared: the blocks of the few distinct experts of a batch stand beside each other in one matrix, and every row scales
  each expert's part by its gate, 0 for most. Best for few experts, above all while decoding (bfloat16, 16 rows: 1.2 of
  the bare pass against 1.4).
- gathered: each row gathers its own blocks (`bmm`, `baddbmm`). Its cost does not grow with the experts in a batch.

Blocks are gathered when a layer first needs them and kept until the gates change, so decoding gathers once.

Invariant: a row whose members are all slot 0 gets the base output bit for bit; a batch of such rows costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dylora_stream.core.errors import ModelMismatch
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone, linear_shape
from dylora_stream.model.config import PoolConfig
from dylora_stream.model.features import stem_features

__all__ = ["BACKBONE_SLOT", "Pool", "StemHook", "StemOutput"]

BACKBONE_SLOT = 0  # the null expert: no blocks
# Distinct experts in a batch, for each member of a row, up to which the shared way is faster.
SHARED_EXPERTS = 4
SHARED_EXPERTS_BFLOAT16 = 8  # batched products are slow there


@dataclass(frozen=True, slots=True)
class _Gates:
    """Who answers each row. `shares` (B, D) over the distinct slots; `slots`, `weights` (B, m) row by row."""

    distinct: Tensor  # (D,) int64
    shares: Tensor  # (B, D) float32
    slots: Tensor  # (B, m) int64
    weights: Tensor  # (B, m) float32
    is_shared: bool  # which way the sum is computed

    def rows(self, index: Tensor) -> "_Gates":
        return replace(self, shares=self.shares[index], slots=self.slots[index], weights=self.weights[index])


class Pool:
    """The experts' blocks, and the forward hooks that add them. Not thread-safe; slots change between batches only."""

    def __init__(self, backbone: Backbone, config: PoolConfig) -> None:
        self._config = config
        self._device, self._dtype = backbone.device, backbone.dtype
        modules = backbone.upper_linears()
        self._shapes = {name: linear_shape(module) for name, module in modules.items()}
        self._a = {name: self._empty(d_in) for name, (d_in, _) in self._shapes.items()}
        self._b = {name: self._empty(d_out) for name, (_, d_out) in self._shapes.items()}
        self._gates: _Gates | None = None
        self._blocks: dict[str, tuple[Tensor, Tensor]] = {}
        self._scale: Tensor | None = None
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    @property
    def slots(self) -> int:
        """Places for experts; their numbers are 1 … slots."""
        return self._config.slots

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot; layers it does not name get none. Raises ModelMismatch before it writes."""
        self.check(adapter)
        self.clear(slot)
        for name, (a, b) in adapter.tensors.items():
            self._a[name][slot, : a.shape[0]] = a.to(self._device, self._dtype)
            self._b[name][slot, : b.shape[1]] = b.t().to(self._device, self._dtype)

    def check(self, adapter: Adapter) -> None:
        """Whether an adapter fits this backbone and the pool's rank; raises ModelMismatch with what does not."""
        if adapter.rank > self._config.rank:
            raise ModelMismatch(
                f"an adapter of rank {adapter.rank} does not fit: raise pool.rank ({self._config.rank})"
            )
        for name, (a, b) in adapter.tensors.items():
            if name not in self._shapes:
                raise ModelMismatch(
                    f"an adapter changes {name}, which this backbone does not have above its stem"
                )
            if (a.shape[1], b.shape[0]) != self._shapes[name]:
                raise ModelMismatch(f"an adapter has other dimensions than the backbone at {name}")

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if not 1 <= slot <= self.slots:
            raise ValueError(f"slot {slot} is not one of 1 … {self.slots}")
        self.no_gates()
        for blocks in (*self._a.values(), *self._b.values()):
            blocks[slot] = 0

    def set_gates(self, slots: Tensor, weights: Tensor) -> None:
        """From now on row i of a batch is answered by `slots` (B, m) int64 with `weights` (B, m) float32.

        Weights may carry gradients. The backbone's share is whatever the members of slot 0 have: it adds nothing.
        """
        slots = slots.cpu()
        is_expert = slots != BACKBONE_SLOT
        if not weights.requires_grad:
            is_expert &= weights.detach().cpu() != 0
        self._set(None)
        if not is_expert.any():
            return
        members = int(is_expert.sum(1).max())
        front = (~is_expert).int().argsort(dim=1, stable=True)[:, :members]  # members with blocks first
        slots = torch.where(is_expert, slots, BACKBONE_SLOT).gather(1, front)
        weights = torch.where(is_expert.to(self._device), weights.to(self._device), 0.0)
        weights = weights.gather(1, front.to(self._device))
        distinct = slots[slots != BACKBONE_SLOT].unique()
        member = slots[:, :, None] == distinct  # (B, m, D)
        shares = (weights[:, :, None] * member.to(self._device)).sum(1)
        limit = SHARED_EXPERTS_BFLOAT16 if self._dtype is torch.bfloat16 else SHARED_EXPERTS
        is_shared = len(distinct) <= limit * members
        self._set(_Gates(distinct.to(self._device), shares, slots.to(self._device), weights, is_shared))

    def keep_rows(self, index: Tensor) -> None:
        """Go on with these rows of the batch, in this order, repeats allowed: index (B',) int64."""
        if self._gates is None:
            return
        gates, blocks = self._gates.rows(index), self._blocks
        self._set(gates)
        if gates.is_shared:
            self._blocks = blocks

    @contextmanager
    def rows(self, index: Tensor) -> Iterator[None]:
        """Within: `keep_rows`; afterwards the gates as they were."""
        before = (self._gates, self._blocks, self._scale)
        self.keep_rows(index)
        try:
            yield
        finally:
            self._gates, self._blocks, self._scale = before

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
        self._gates, self._blocks, self._scale = gates, {}, None
        if gates is None:
            return
        scale = gates.shares if gates.is_shared else gates.weights
        if scale.requires_grad or not bool((scale == 1).all()):
            self._scale = scale.to(self._dtype).repeat_interleave(self._config.rank, dim=1)[
                :, None
            ]  # (B, 1, n·r)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return None if self._gates is None else self._added(name, args[0], output, self._gates)

        return add

    def _added(self, name: str, x: Tensor, output: Tensor, gates: _Gates) -> Tensor:
        rows = len(gates.slots)
        shape = output.shape
        x, output = (
            x.reshape(rows, -1, x.shape[-1]),
            output.reshape(rows, -1, shape[-1]),
        )  # some models flatten (B·T, d)
        blocks = self._blocks.get(name)
        if blocks is None:
            blocks = self._blocks[name] = self._gather(name, gates)
        a, b = blocks
        if gates.is_shared:
            low = nn.functional.linear(x, a)  # (B, T, D·r)
            low = low if self._scale is None else low * self._scale
            whole = torch.addmm(output.view(-1, shape[-1]), low.view(-1, low.shape[-1]), b)
        else:
            low = torch.bmm(x, a)  # (B, T, m·r)
            low = low if self._scale is None else low * self._scale
            whole = torch.baddbmm(output, low, b)
        return whole.view(shape)

    def _gather(self, name: str, gates: _Gates) -> tuple[Tensor, Tensor]:
        chosen = gates.distinct if gates.is_shared else gates.slots
        a, b = self._a[name][chosen].flatten(-3, -2), self._b[name][chosen].flatten(-3, -2)
        return (a, b) if gates.is_shared else (a.transpose(1, 2), b)  # a: (D·r, d_in) or (B, d_in, m·r)

    def _empty(self, width: int) -> Tensor:
        """Blocks of every slot, (slots + 1, r, width); B lies transposed, so that blocks of both stack along r."""
        shape = (self._config.slots + 1, self._config.rank, width)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)


@dataclass(frozen=True, slots=True)
class StemOutput:
    """What the router sees: states (B, T, d) of the stem, mask (B, T) of the prompt, features (B, d) float32."""

    states: Tensor
    mask: Tensor
    features: Tensor

    @classmethod
    def of(cls, states: Tensor, mask: Tensor) -> "StemOutput":
        """With the features computed."""
        return cls(states, mask, stem_features(states, mask))


class StemHook:
    """Calls a decision in front of the first layer above the stem, once a routed forward pass.

    The layer itself sees a 4-D mask or none, so the 2-D one is given by context. Later passes of the same context (one
    token each, while decoding) keep what was decided.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._pending: tuple[Tensor, Callable[[StemOutput], None]] | None = None
        layer = backbone.layers[backbone.stem_layers]
        self._handle = layer.register_forward_pre_hook(self._at_stem, with_kwargs=True)

    @contextmanager
    def routing(self, mask: Tensor, decide: Callable[[StemOutput], None]) -> Iterator[None]:
        """Within: the next forward pass calls `decide`, which sets the gates. mask: (B, T) of the prompt's tokens."""
        self._pending = (mask, decide)
        try:
            yield
        finally:
            self._pending = None

    def close(self) -> None:
        """Take the hook off the model. May be called twice."""
        self._handle.remove()

    def _at_stem(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._pending is None:
            return
        (mask, decide), self._pending = self._pending, None
        states = args[0] if args else kwargs["hidden_states"]
        decide(StemOutput.of(states, mask))
