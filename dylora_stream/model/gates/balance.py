"""Balance by a sign rule, without a loss: after each step, bias += rate · sign(mean use - use).

Use is the number of a batch's tokens at which a rank was chosen. Only the young expert's biases move, against the mean
over all ranks that competed: old biases are frozen with their experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dylora_stream.model.backbone import Tokens
from dylora_stream.model.gates.base import Stage
from dylora_stream.model.gates.table import ExpertTable
from dylora_stream.model.gates.uniform import Among
from dylora_stream.model.mixture import YOUNG_SLOT, LayerView, RankGate

__all__ = ["BIAS", "Balanced"]

BIAS = "bias"  # the table's part, (r,) a layer and expert


class _Counted:
    """A `RankGate` that counts how often the young expert's ranks are chosen."""

    def __init__(self, ranks: RankGate) -> None:
        self._ranks = ranks
        self.mask = torch.empty(0)  # (B, T) bool of the pass under way
        self.errors: dict[str, Tensor] = {}  # layer → (r,) mean use - use

    def weigh(self, view: LayerView) -> Tensor:
        weights = self._ranks.weigh(view)
        chosen = (weights.detach() != 0) & self.mask[:, :, None, None]
        use = chosen.sum((0, 1)).float()  # (D, r)
        self.errors[view.layer] = use.mean() - use[view.slots == YOUNG_SLOT].sum(0)
        return weights


class Balanced(Among):
    """Training among the old experts; the young one's biases move by the rule."""

    def __init__(
        self, stage: Stage, ranks: RankGate, table: ExpertTable, expert_id: str, *, rate: float
    ) -> None:
        self._counted = _Counted(ranks)
        super().__init__(stage, self._counted)
        self._table, self._expert_id, self._rate = table, expert_id, rate

    @contextmanager
    def batch(self, tokens: Tokens) -> Iterator[None]:
        """As `Among`, and padding is not counted."""
        self._counted.mask = tokens.attention_mask.bool()
        with super().batch(tokens):
            yield

    def stepped(self) -> None:
        """One step of the rule at every layer."""
        for layer, error in self._counted.errors.items():
            self._table.get(BIAS, layer, self._expert_id).add_(self._rate * error.sign())
        self._table.changed()
