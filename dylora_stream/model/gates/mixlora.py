"""Conditional MixLoRA (2402.15896): a row's input chooses A-factors, and with them B-factors, out of all experts'.

    p_A = top-r softmax of W_A z                over the E·r A-factors; z: pooled input
    p_B = top-r softmax of W_B z + W_C (p_Aᵀ W_A)          the second term is the condition on the chosen A-factors
    g_i = r p_A,i · r p_B,i

Against the paper: factors are chosen once a row, from the stem's features, not at every layer; the condition reads the
router's rows of the chosen A-factors, as the factors themselves differ from layer to layer; and the pool keeps the
pairs A_i, B_i together, so a pair's weight is the product of both choices' weights and an A-factor whose B-factor was
not chosen is silent. W_A and W_B start alike and W_C at 0, so that they first choose the same pairs. A new expert's
rows learn with it, old ones are frozen.
"""

from collections.abc import Sequence

from torch import Tensor

from dylora_stream.model.gates.members import top_softmax
from dylora_stream.model.gates.row_ranks import RowRanks

__all__ = ["MixLoRAGate"]

CHOOSE_A, CHOOSE_B, CONDITION = "choose_a", "choose_b", "condition"


class MixLoRAGate(RowRanks):
    """As many pairs a row as an expert has ranks, from anywhere in the pool."""

    name = "mixlora"
    trained_parts = (CHOOSE_A, CHOOSE_B, CONDITION)
    zero_parts = (CONDITION,)

    def weigh(self, z: Tensor, expert_ids: Sequence[str], allowed: Tensor, *, is_training: bool) -> Tensor:
        """(B, E, r)."""
        del is_training
        keys = self._table.gather(CHOOSE_A, "", expert_ids).to(z.device)  # (E, r, d)
        rank = keys.shape[1]
        is_member = allowed[:, :, None].expand(-1, -1, rank).flatten(1)  # (B, E·r)
        chosen_a = top_softmax(self.logits(CHOOSE_A, z, expert_ids), is_member, rank)
        condition = chosen_a @ keys.flatten(0, 1) / rank  # (B, d)
        logits_b = self.logits(CHOOSE_B, z, expert_ids) + self.logits(CONDITION, condition, expert_ids)
        chosen_b = top_softmax(logits_b, is_member, rank)
        return (chosen_a * chosen_b).unflatten(1, (len(expert_ids), rank))
