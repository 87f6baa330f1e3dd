"""The stem's output of every training row, computed once and kept for all epochs.

It is used only where a proof pass shows that the layers above get the very states that a whole pass gives them.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.features import length_sorted, states_behind
from dylora_stream.model.tokenised import TokenRow, padded

__all__ = ["StemCache"]

CACHE_BYTES = 512 * 2**20  # above this, recomputing costs less than the memory is worth
PROOF_ROWS = 2  # shortest rows, and as many longest ones: the proof is passes that train nothing
FILL_BATCH = 16  # rows of a pass that fills it


class StemCache:
    """What the first layers give for every training row; within it, these hand that on instead of computing.

    The layers stay in their places with their attributes, only their `forward` is shadowed: embeddings, masks and
    position tables are the model's own, whatever its architecture.
    """

    def __init__(self, backbone: Backbone, depth: int, states: list[Tensor]) -> None:
        self._layers = list(backbone.layers)[:depth]
        self._states = states  # a row: (T, d)
        self._batch: Tensor | None = None

    @classmethod
    def proved(cls, backbone: Backbone, rows: Sequence[TokenRow], depth: int) -> Self | None:
        """A filled cache of the first `depth` layers, or None where it would be too large or not give the full pass's
        states."""
        size = sum(len(row) for row in rows) * backbone.width * backbone.dtype.itemsize
        by_length = sorted(rows, key=len)
        few = by_length[:PROOF_ROWS] + by_length[-PROOF_ROWS:]  # much padding, and the longest there is
        if size > CACHE_BYTES or not _replays(backbone, depth, padded(backbone, few)):
            return None
        states: list[Tensor] = [torch.empty(0)] * len(rows)
        for chosen in length_sorted([len(row) for row in rows], FILL_BATCH):
            tokens = padded(backbone, [rows[row] for row in chosen])
            for row, state in zip(chosen, states_behind(backbone, depth, tokens), strict=True):
                states[row] = state[-len(rows[row]) :].clone()
        return cls(backbone, depth, states)

    def put(self, chosen: Sequence[int], tokens: Tokens) -> None:
        """The rows of the next forward pass, padded as `tokens` is."""
        batch = torch.zeros((*tokens.input_ids.shape, self._states[0].shape[-1]), dtype=self._states[0].dtype)
        batch = batch.to(tokens.input_ids.device)
        for place, row in enumerate(chosen):
            batch[place, -len(self._states[row]) :] = self._states[row]
        self._batch = batch

    def hand_on(self, batch: Tensor) -> None:
        """The states (B, T, d) of the next forward pass."""
        self._batch = batch

    def __enter__(self) -> Self:
        for layer in self._layers:
            layer.forward = lambda *_args, **_kwargs: self._batch
        return self

    def __exit__(self, *_error: object) -> None:
        for layer in self._layers:
            del layer.forward


@torch.no_grad()
def _replays(backbone: Backbone, depth: int, tokens: Tokens) -> bool:
    """Whether handing the first layers' output to those above gives the very states of the full pass."""
    needed = tokens.answer_positions()
    whole = backbone.body(**tokens.inputs(), use_cache=False)[0][needed]
    cache = StemCache(backbone, depth, [])
    cache.hand_on(states_behind(backbone, depth, tokens))
    try:
        with cache:
            replayed = backbone.body(**tokens.inputs(), use_cache=False)[0][needed]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False  # layers that hand on more than states: every pass is whole
    return torch.equal(whole, replayed)
