"""Pools of random experts, and PEFT with the very same ones.

PEFT keeps adapters in float32 on a bfloat16 base, and casts every activation for them; here they are cast to the
base's dtype, as ours are, which is faster.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylora_stream.bench.throughput.bare import twin
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone, linear_shape
from dylora_stream.model.config import PoolConfig
from dylora_stream.model.mixture import Pool

__all__ = ["Draws", "PeftModel", "filled_pool", "random_adapter"]

B_SPREAD = 0.02  # of a random B: about what training makes of it


def random_adapter(backbone: Backbone, seed: int, rank: int, b_spread: float = B_SPREAD) -> Adapter:
    """An expert of every layer above the stem."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in backbone.upper_linears().items():
        d_in, d_out = linear_shape(module)
        a = (torch.rand((rank, d_in), generator=generator) * 2 - 1) * d_in**-0.5
        tensors[name] = (a, torch.randn((d_out, rank), generator=generator) * b_spread)
    return Adapter(rank=rank, tensors=tensors)


@contextmanager
def filled_pool(bare: Backbone, size: int, rank: int) -> Iterator[tuple[Backbone, Pool]]:
    """A twin of the bare backbone with a pool whose slots 1 … size are random experts."""
    backbone = twin(bare)
    pool = Pool(backbone, PoolConfig(slots=size, rank=rank))
    try:
        for slot in range(1, size + 1):
            pool.write(slot, random_adapter(backbone, slot, rank))
        yield backbone, pool
    finally:
        pool.close()


@dataclass(slots=True)
class Draws:
    """Slots for a batch, new ones each time, so that no block is warm from the pass before; the same ones each run.

    With one member every row has another expert, as far as there are as many.
    """

    rows: int
    experts: int
    members: int = 1
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def next(self) -> tuple[Tensor, Tensor]:
        """(slots (B, m) int64, weights (B, m) float32)."""
        if self.members == 1:
            order = torch.randperm(self.experts, generator=self.generator)
            slots = order[torch.arange(self.rows) % self.experts, None] + 1
        else:
            each = torch.rand((self.rows, self.experts), generator=self.generator)
            slots = each.argsort(1)[:, : self.members] + 1
        return slots, torch.full(slots.shape, 1 / slots.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftModel:
    """PEFT around a module of a backbone (its body, or all of it): `model(...)` computes with the active adapter."""

    model: Any
    config: Any
    layers: dict[str, Any]  # full name in the backbone → PEFT's layer
    dtype: torch.dtype

    @classmethod
    def around(cls, backbone: Backbone, module: Any, rank: int, alpha: int) -> "PeftModel":
        """Changes the module in its place; its first adapter is named `default`."""
        from peft import LoraConfig, get_peft_model

        linears = backbone.upper_linears()
        names = {id(inner): name for name, inner in module.named_modules()}
        inside = {full: names[id(linear)] for full, linear in linears.items()}
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=list(inside.values()),
            fan_in_fan_out=any(isinstance(linear, Conv1D) for linear in linears.values()),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
            model = get_peft_model(module, config, autocast_adapter_dtype=False)
        base = model.get_base_model()
        layers = {full: base.get_submodule(name) for full, name in inside.items()}
        return cls(model=model.eval(), config=config, layers=layers, dtype=backbone.dtype)

    def add(self, name: str, adapter: Adapter) -> None:
        """Another adapter, in the base's dtype."""
        self.model.add_adapter(name, self.config, autocast_adapter_dtype=False)
        self.put(name, adapter)
        self.model.eval()

    @torch.no_grad()
    def put(self, name: str, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
        """Set an adapter's weights, in `dtype` or the base's."""
        for layer, (a, b) in adapter.tensors.items():
            for half, value in zip(self._halves(layer, name), (a, b), strict=True):
                half.weight.data = value.to(half.weight.device, dtype or self.dtype, copy=True)

    def taken(self, name: str, scale: float) -> Adapter:
        """An adapter's weights as ours, the scale within B."""
        halves = {layer: self._halves(layer, name) for layer in self.layers}
        tensors = {
            layer: (a.weight.detach().float().cpu(), b.weight.detach().float().cpu() * scale)
            for layer, (a, b) in halves.items()
        }
        return Adapter(rank=self.config.r, tensors=tensors)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _halves(self, layer: str, name: str) -> tuple[Any, Any]:
        found = self.layers[layer]
        return found.lora_A[name], found.lora_B[name]
