"""Where the experts' A's and B's lie, and how those of a batch are brought together.

Slots are preallocated; slot 0 is the backbone and stays empty. A's of layers that read the same tensor (query, key,
value; gate, up) lie beside each other, so that one gather and one product serve them all.

Blocks that rows gather are written into places that the next gather of the same layers uses again. Fresh memory for
16 experts is 57 MB a pass, and its page faults alone took up to a tenth of the pass's time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dylora_stream.core.errors import ModelMismatch
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone, linear_shape
from dylora_stream.model.config import PoolConfig

__all__ = ["BACKBONE_SLOT", "Blocks", "Group", "check_layers", "shapes_of"]

BACKBONE_SLOT = 0  # the null expert: no blocks

Group = tuple[str, ...]  # layers that read the same tensor


def shapes_of(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Layer → (d_in, d_out)."""
    return {name: linear_shape(module) for name, module in modules.items()}


def check_layers(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Whether an adapter's layers are among these, in their dimensions; raises ModelMismatch with what does not fit."""
    for name, (a, b) in adapter.tensors.items():
        if name not in shapes:
            raise ModelMismatch(
                f"an adapter changes {name}, which this backbone does not have above its stem; "
                "it was trained with another model.stem_layers or another model"
            )
        if (a.shape[1], b.shape[0]) != shapes[name]:
            raise ModelMismatch(f"an adapter has other dimensions than the backbone at {name}")


class Blocks:
    """A's and B's of every slot, in the backbone's type. Not thread-safe."""

    def __init__(self, backbone: Backbone, config: PoolConfig) -> None:
        self._config = config
        self._device, self._dtype = backbone.device, backbone.dtype
        modules = backbone.upper_linears()
        self.shapes = shapes_of(modules)
        self.groups = _groups(backbone, modules)
        joint = {group: self.shapes[group[0]][0] for group in self.groups.values()}
        self._a = {group: self._empty(len(group), d_in) for group, d_in in joint.items()}
        self._b = {name: self._empty(1, d_out) for name, (_, d_out) in self.shapes.items()}
        self._places: dict[Group | str, Tensor] = {}  # where rows' blocks are gathered

    def of(self, slot: int, layer: str) -> tuple[Tensor, Tensor]:
        """(A (r, d_in), B (d_out, r)) of a slot: views."""
        return self._part(layer, slot), self._b[layer][slot].t()

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot; layers it does not name get none. Raises ModelMismatch before it writes."""
        self.check(adapter)
        self.clear(slot)
        for name, (a, b) in adapter.tensors.items():
            self._part(name, slot)[: a.shape[0]] = a.to(self._device, self._dtype)
            self._b[name][slot, : b.shape[1]] = b.t().to(self._device, self._dtype)

    def check(self, adapter: Adapter) -> None:
        """Whether an adapter fits this backbone and the pool's rank; raises ModelMismatch with what does not."""
        if adapter.rank > self._config.rank:
            raise ModelMismatch(
                f"an adapter of rank {adapter.rank} does not fit: raise pool.rank ({self._config.rank})"
            )
        check_layers(adapter, self.shapes)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if not 1 <= slot <= self._config.slots:
            raise ValueError(f"slot {slot} is not one of 1 … {self._config.slots}")
        for blocks in (*self._a.values(), *self._b.values()):
            blocks[slot] = 0

    def row_a(self, group: Group, slots: Tensor) -> Tensor:
        """A's of each row's members, (B, m·layers·r, d_in); slots (B, m). Good until the next call for the group."""
        return self._gathered(group, self._a[group], slots)

    def row_b(self, layer: str, slots: Tensor) -> Tensor:
        """B's of each row's members, (B, m·r, d_out); slots (B, m). Good until the next call for the layer."""
        return self._gathered(layer, self._b[layer], slots)

    def batch_a(self, group: Group, slots: Tensor) -> Tensor:
        """A's of a batch's experts, layer by layer: (layers·D·r, d_in); slots (D,)."""
        chosen = self._a[group][slots].unflatten(1, (len(group), -1))
        return chosen.transpose(0, 1).flatten(0, 2)

    def batch_b(self, layer: str, slots: Tensor) -> Tensor:
        """B's of a batch's experts, (D·r, d_out); slots (D,)."""
        return self._b[layer][slots].flatten(0, 1)

    def _gathered(self, key: Group | str, whole: Tensor, slots: Tensor) -> Tensor:
        wanted, each = slots.numel(), whole[0].numel()
        place = self._places.get(key)
        if place is None or len(place) < wanted:
            place = self._places[key] = whole.new_empty(wanted, each)
        torch.index_select(whole.flatten(1), 0, slots.flatten(), out=place[:wanted])
        return place[:wanted].view(len(slots), -1, whole.shape[2])

    def _part(self, layer: str, slot: int) -> Tensor:
        group = self.groups[layer]
        start = group.index(layer) * self._config.rank
        return self._a[group][slot, start : start + self._config.rank]

    def _empty(self, layers: int, width: int) -> Tensor:
        """(slots + 1, layers·r, width); B lies transposed, so that blocks of both stack along r."""
        shape = (self._config.slots + 1, layers * self._config.rank, width)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)


@torch.no_grad()
def _groups(backbone: Backbone, modules: Mapping[str, nn.Module]) -> dict[str, Group]:
    """Layer → the layers that read the very tensor that it reads, itself among them; found by a pass of one token."""
    readers: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found = next((names for x, names in readers if x is args[0]), None)
            if found is None:
                readers.append((args[0], [name]))
            else:
                found.append(name)

        return read

    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        backbone.body(**backbone.pad([[backbone.eos_id]]).inputs(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups = {name: tuple(names) for _, names in readers for name in names}
    return {name: groups.get(name, (name,)) for name in modules}
