"""Members of a row and weights over them, for gates that weigh ranks.

Invariant: what a row gets does not depend on the other rows of its batch; experts that are not its members have no say.
"""

import torch
from torch import Tensor

from dylora_stream.model.mixture import LayerView

__all__ = ["FAR", "member_softmax", "members_of", "spread", "top_members", "top_softmax"]

FAR = -1e30  # a logit that never wins; finite, because rows without members must not become NaN
TINY = 1e-12


def members_of(view: LayerView) -> Tensor:
    """(B, 1, D, 1) bool."""
    return (view.shares != 0)[:, None, :, None]


def member_softmax(logits: Tensor, is_member: Tensor) -> Tensor:
    """Softmax over members in the last dimension, 0 elsewhere; all 0 without any."""
    return torch.where(is_member, logits, FAR).softmax(-1) * is_member


def top_members(scores: Tensor, is_member: Tensor, k: int) -> Tensor:
    """(..., n) bool: the k members with the largest scores, all of them where there are fewer."""
    top = torch.where(is_member, scores, FAR).topk(min(k, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top, value=True) & is_member


def spread(values: Tensor, chosen: Tensor) -> Tensor:
    """m · values / Σ values over the m chosen, 0 elsewhere: their mean is 1."""
    kept = torch.where(chosen, values, 0.0)
    return kept * chosen.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=TINY)


def top_softmax(logits: Tensor, is_member: Tensor, k: int) -> Tensor:
    """m · softmax over the m ≤ k members with the largest logits, 0 elsewhere."""
    chosen = top_members(logits, is_member, k)
    return member_softmax(logits, chosen) * chosen.sum(-1, keepdim=True)
