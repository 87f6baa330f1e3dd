"""Stored rows at the stem: token states, masks and features of each expert's, read once for what learns from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText, length_sorted, read_states, stem_features

__all__ = ["Exemplars", "read_exemplars"]

READ_BATCH = 16  # rows of one pass through the stem


@dataclass(frozen=True, slots=True)
class Exemplars:
    """n rows in batches of near-equal length."""

    states: list[Tensor]  # a batch: (B, T, d)
    masks: list[Tensor]  # a batch: (B, T)
    features: np.ndarray  # (n, d) float32
    owners: Tensor  # (n,) int64, which expert's


def read_exemplars(
    backbone: Backbone, exemplars: Sequence[Sequence[LabelledText]], max_tokens: int
) -> Exemplars:
    """Prompts of each expert's rows, each expert's first ones that fit into an equal share of `max_tokens`."""
    prompts: list[list[int]] = []
    owners: list[int] = []
    share = max_tokens // len(exemplars)
    for owner, rows in enumerate(exemplars):
        ids = backbone.prompt_ids([row.input for row in rows])
        kept = _fitting(ids, max(share, 1))
        prompts += kept
        owners += [owner] * len(kept)
    states, masks, features, order = [], [], [], []
    for chosen in length_sorted([len(prompt) for prompt in prompts], READ_BATCH):
        tokens = backbone.pad([prompts[row] for row in chosen])
        states.append(read_states(backbone, tokens))
        masks.append(tokens.attention_mask)
        features.append(stem_features(states[-1], tokens.attention_mask).cpu().numpy())
        order += chosen
    return Exemplars(states, masks, np.concatenate(features), torch.tensor(owners)[order])


def _fitting(prompts: Sequence[list[int]], share: int) -> list[list[int]]:
    """Those that find room, a long one passed over for the shorter ones behind it; one cut short where none does."""
    kept, left = [], share
    for prompt in prompts:
        if len(prompt) <= left:
            kept.append(prompt)
            left -= len(prompt)
    return kept or [prompts[0][:share]]
