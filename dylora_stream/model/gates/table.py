"""What a rank gate has learned: tensors by (part, layer, expert), looked up by the slots that a pass holds.

A part belongs to a layer and an expert; "" stands for no layer (a row's gate) and for no expert (a shared part). Stacks
are kept while the slots of a pass stay the same object, so decoding stacks once; never while a part takes gradients.
"""

from collections.abc import Iterable, Mapping, Sequence

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
        self._tensors: dict[tuple[str, str, str], Tensor] = {}
        self._stacks: dict[tuple[str, str, torch.dtype], tuple[Tensor, Tensor]] = {}

    def follow(self, stage: Stage, young: str | None = None) -> None:
        """Take over the stage's slots, with `young` in training beside them; experts that left are forgotten."""
        self._slots = dict(stage.slots)
        if young is not None:
            self._slots[young] = YOUNG_SLOT
        kept = {"", *self._slots}
        device = stage.backbone.device
        self._tensors = {key: tensor.to(device) for key, tensor in self._tensors.items() if key[2] in kept}
        self.changed()

    def put(self, key: tuple[str, str, str], tensor: Tensor) -> None:
        """Under (part, layer, expert)."""
        self._tensors[key] = tensor
        self.changed()

    def get(self, part: str, layer: str = "", expert_id: str = "") -> Tensor:
        """KeyError without it."""
        return self._tensors[part, layer, expert_id]

    def has(self, part: str, layer: str = "", expert_id: str = "") -> bool:
        """Whether there is one."""
        return (part, layer, expert_id) in self._tensors

    def tensors(self, parts: Iterable[str], expert_id: str | None = None) -> list[Tensor]:
        """All tensors of these parts, of one expert or of all."""
        wanted = set(parts)
        return [
            tensor
            for (part, _, owner), tensor in self._tensors.items()
            if part in wanted and expert_id in (None, owner)
        ]

    def gather(self, part: str, layer: str, expert_ids: Sequence[str | None]) -> Tensor:
        """(E, ...) in the order given."""
        found = [
            None if expert_id is None else self._tensors.get((part, layer, expert_id))
            for expert_id in expert_ids
        ]
        like = next(
            tensor for key, tensor in self._tensors.items() if key[:2] == (part, layer) and key[2] != ""
        )
        return torch.stack([torch.zeros_like(like) if tensor is None else tensor for tensor in found])

    def stacked(self, part: str, view: LayerView, dtype: torch.dtype = torch.float32) -> Tensor:
        """(D, ...) of the experts of a pass, on its device."""
        key = (part, view.layer, dtype)
        held = self._stacks.get(key)
        if held is not None and held[0] is view.slots:
            return held[1]
        ids = {slot: expert_id for expert_id, slot in self._slots.items()}
        stack = self.gather(part, view.layer, [ids.get(slot) for slot in view.slots.tolist()])
        stack = stack.to(view.inputs.device, dtype)
        if not any(tensor.requires_grad for tensor in self.tensors([part])):
            self._stacks[key] = (view.slots, stack)
        return stack

    def changed(self) -> None:
        """Tensors were changed in place, or the slots were."""
        self._stacks = {}

    def state(self) -> dict[str, Tensor]:
        """Flat: `part:layer:expert` and `slot:expert`."""
        slots = {f"{SLOT}:{expert_id}": torch.tensor(slot) for expert_id, slot in self._slots.items()}
        return slots | {":".join(key): tensor.detach().cpu().clone() for key, tensor in self._tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Exactly that state."""
        self._slots, self._tensors = {}, {}
        for name, tensor in state.items():
            part, _, rest = name.partition(":")
            if part == SLOT:
                self._slots[rest] = int(tensor)
            else:
                layer, _, expert_id = rest.partition(":")
                self._tensors[part, layer, expert_id] = tensor.detach().clone()
        self.changed()


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
