"""What a rank gate has learned: tensors by (part, layer, expert), looked up by the slots that a pass holds.

A part belongs to a layer and an expert; "" stands for no layer (a row's gate) and for no expert (a shared part). Stacks
are kept as long as passes hold the same slots and the table does not change; never of tensors that take gradients.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dylora_stream.model.gates.base import Lesson, Stage
from dylora_stream.model.mixture import YOUNG_SLOT, LayerView
from dylora_stream.model.training import Company

__all__ = ["ExpertTable", "Tabled"]

SLOT = "slot"  # before an expert's id in the state


class ExpertTable:
    """Grows by an expert at a time. An expert without a part counts as zeros there."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._parts: dict[tuple[str, str], dict[str, Tensor]] = {}  # (part, layer) → expert → tensor
        self._stacks: dict[tuple[str, str, torch.dtype], tuple[list[int], Tensor]] = {}
        self._read: tuple[Tensor, list[int]] | None = None  # a pass's slots

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertTable":
        """Without what passes keep, which one may be adding to right now."""
        fresh = memo[id(self)] = ExpertTable()
        fresh._slots, fresh._parts = dict(self._slots), copy.deepcopy(self._parts, memo)
        return fresh

    def follow(self, stage: Stage, young: str | None = None) -> None:
        """Take over the stage's slots, with `young` in training beside them; experts that left are forgotten."""
        self._slots = dict(stage.slots)
        if young is not None:
            self._slots[young] = YOUNG_SLOT
        kept, device = {"", *self._slots}, stage.backbone.device
        self._parts = {
            key: {expert_id: tensor.to(device) for expert_id, tensor in owned.items() if expert_id in kept}
            for key, owned in self._parts.items()
        }
        self.changed()

    def put(self, key: tuple[str, str, str], tensor: Tensor) -> None:
        """Under (part, layer, expert)."""
        self._parts.setdefault(key[:2], {})[key[2]] = tensor
        self.changed()

    def get(self, part: str, layer: str = "", expert_id: str = "") -> Tensor:
        """KeyError without it."""
        return self._parts[part, layer][expert_id]

    def has(self, part: str, layer: str = "", expert_id: str = "") -> bool:
        """Whether there is one."""
        return expert_id in self._parts.get((part, layer), {})

    def tensors(self, parts: Iterable[str], expert_id: str | None = None) -> list[Tensor]:
        """All tensors of these parts, of one expert or of all, in an order that does not depend on how they came."""
        wanted = set(parts)
        return [
            owned[owner]
            for (part, _), owned in sorted(self._parts.items(), key=lambda item: item[0])
            if part in wanted
            for owner in sorted(owned)
            if expert_id in (None, owner)
        ]

    def gather(self, part: str, layer: str, expert_ids: Sequence[str | None]) -> Tensor:
        """(E, ...) in the order given."""
        return torch.stack(self._found(part, layer, expert_ids))

    def stacked(self, part: str, view: LayerView, dtype: torch.dtype = torch.float32) -> Tensor:
        """(D, ...) of the experts of a pass, on its device."""
        key, slots = (part, view.layer, dtype), self._slots_of(view)
        held = self._stacks.get(key)
        if held is not None and held[0] == slots:
            return held[1]
        ids = {slot: expert_id for expert_id, slot in self._slots.items()}
        found = self._found(part, view.layer, [ids.get(slot) for slot in slots])
        stack = torch.stack(found).to(view.inputs.device, dtype)
        if not any(tensor.requires_grad for tensor in found):
            self._stacks[key] = (slots, stack)
        return stack

    def changed(self) -> None:
        """Tensors were changed in place, or the slots were."""
        self._stacks = {}

    def state(self) -> dict[str, Tensor]:
        """Flat: `part:layer:expert` and `slot:expert`."""
        slots = {f"{SLOT}:{expert_id}": torch.tensor(slot) for expert_id, slot in self._slots.items()}
        return slots | {
            f"{part}:{layer}:{expert_id}": tensor.detach().cpu().clone()
            for (part, layer), owned in self._parts.items()
            for expert_id, tensor in owned.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Exactly that state."""
        self._slots, self._parts = {}, {}
        for name, tensor in state.items():
            part, _, rest = name.partition(":")
            if part == SLOT:
                self._slots[rest] = int(tensor)
            else:
                layer, _, expert_id = rest.partition(":")
                self.put((part, layer, expert_id), tensor.detach().clone())
        self.changed()

    def _found(self, part: str, layer: str, expert_ids: Sequence[str | None]) -> list[Tensor]:
        owned = self._parts[part, layer]
        zeros = torch.zeros_like(next(iter(owned.values())))
        return [zeros if expert_id is None else owned.get(expert_id, zeros) for expert_id in expert_ids]

    def _slots_of(self, view: LayerView) -> list[int]:
        """Read from the device once a pass: its layers hold the same tensor."""
        if self._read is None or self._read[0] is not view.slots:
            self._read = (view.slots, view.slots.tolist())
        return self._read[1]


class Tabled:
    """The learning side of a gate whose numbers lie in a table; its experts train alone."""

    trained_parts: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._table = ExpertTable()

    @property
    def parameters(self) -> int:
        """Numbers of the trained parts."""
        return sum(tensor.numel() for tensor in self._table.tensors(self.trained_parts))

    def company(self, stage: Stage, lesson: Lesson) -> Company | None:
        """None: alone."""
        del stage, lesson
        return None

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """The new expert's parts stay as its training left them."""
        self._table.follow(stage)
        for tensor in self._table.tensors(self.trained_parts, lesson.expert_id):
            tensor.requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """The table."""
        return self._table.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """From `state`."""
        self._table.restore(state)
