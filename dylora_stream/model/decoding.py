"""Greedy decoding and the ranking of choices, on the gates of the pass that is under way.

A short loop instead of `model.generate`: it drops rows that have ended, and carries no logits processors. Both
functions run inside `LiveExperts.serving`: their first forward pass routes, later ones keep the gates, row by row.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.mixture import Pool

__all__ = ["generate", "rank_choices"]

DROP_SHARE = (
    0.25  # of the rows still in the batch; fewer ended ones are carried, as cutting a cache copies it
)
CHOICE_ROWS = 64  # rows of one pass over choices: bounds the copies of prompts' caches
CHOICE_TOKENS = 2048  # of such a pass, padding included: 1 GB of logits over a vocabulary of 49,000
CHOICE_POSITIONS = 32_768  # of such a pass, the prompts' copies included: SmolLM2-135M keeps 23 kB for each


@torch.no_grad()
def generate(backbone: Backbone, pool: Pool, tokens: Tokens, max_new_tokens: int) -> list[list[int]]:
    """New token ids of each row, the likeliest each time, up to the end token (left out) or `max_new_tokens`."""
    written: list[list[int]] = [[] for _ in range(len(tokens.input_ids))]
    rows = list(range(len(written)))  # of the batch's current rows
    is_open = [True] * len(written)
    mask, position = tokens.attention_mask, tokens.position_ids[:, -1:]
    last, cache = backbone.next_logits(tokens.inputs())
    for step in range(max_new_tokens):
        following = last.argmax(-1)  # (B,)
        for row, token in zip(rows, following.tolist(), strict=True):
            if is_open[row] and token == backbone.eos_id:
                is_open[row] = False
            elif is_open[row]:
                written[row].append(token)
        kept = [place for place, row in enumerate(rows) if is_open[row]]
        if not kept or step == max_new_tokens - 1:
            break
        if len(rows) - len(kept) >= DROP_SHARE * len(rows):
            index = torch.tensor(kept, device=mask.device)
            rows = [rows[place] for place in kept]
            mask, position, following = mask[index], position[index], following[index]
            cache.reorder_cache(index)
            pool.keep_rows(index)
        mask = nn.functional.pad(mask, (0, 1), value=1)
        position = position + 1
        inputs = {"input_ids": following[:, None], "attention_mask": mask, "position_ids": position}
        last, cache = backbone.next_logits(inputs | {"past_key_values": cache})
    return written


@torch.no_grad()
def rank_choices(
    backbone: Backbone, pool: Pool, tokens: Tokens, choices: Sequence[Sequence[list[int]]]
) -> list[int]:
    """The likeliest choice of each row: mean log-likelihood of its tokens, end token included; the first of equals.

    choices: of each row the token ids of each choice, ended by the end token (`Backbone.target_ids`).
    """
    targets = [target for row in choices for target in row]
    owners = [row for row, row_choices in enumerate(choices) for _ in row_choices]
    last, cache = backbone.next_logits(tokens.inputs())
    first = last.float().log_softmax(-1)  # (B, V): the choices' first tokens need no pass of their own
    scores = [0.0] * len(targets)
    for numbers in _passes([len(target) for target in targets], tokens.input_ids.shape[1]):
        part = [targets[number] for number in numbers]
        index = torch.tensor([owners[number] for number in numbers], device=tokens.input_ids.device)
        sums = first[index, torch.tensor([target[0] for target in part], device=index.device)]
        with pool.rows(index):
            sums += _following(backbone, tokens, _expanded(cache, index), (part, index))
        for number, target, total in zip(numbers, part, sums.tolist(), strict=True):
            scores[number] = total / len(target)
    best, place = [], 0
    for row_choices in choices:
        mine = scores[place : place + len(row_choices)]
        best.append(mine.index(max(mine)))
        place += len(row_choices)
    return best


def _passes(lengths: Sequence[int], prompt: int) -> list[list[int]]:
    """Numbers of choices, short ones first, as many to a pass as fit behind copies of a prompt of so many tokens."""
    passes: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        length = lengths[number]
        most = min(CHOICE_ROWS, CHOICE_TOKENS // length, CHOICE_POSITIONS // (prompt + length))
        if not passes or len(passes[-1]) >= most:
            passes.append([])
        passes[-1].append(number)
    return passes


def _following(
    backbone: Backbone, tokens: Tokens, cache: Any, answers: tuple[Sequence[list[int]], Tensor]
) -> Tensor:
    """(n,) float32 summed log-likelihood of targets behind their first token. answers: targets, and the row of each."""
    targets, index = answers
    length = max(len(target) for target in targets) - 1
    device = index.device
    if length == 0:
        return torch.zeros(len(targets), device=device)
    fed = torch.tensor([target[:-1] + [0] * (length + 1 - len(target)) for target in targets], device=device)
    sizes = torch.tensor([len(target) - 1 for target in targets], device=device)
    steps = torch.arange(length, device=device)
    is_fed = (
        steps < sizes[:, None]
    )  # (n, length); padding on the right, at positions that the row's model surely has
    inputs = {
        "input_ids": fed,
        "attention_mask": torch.cat(
            [tokens.attention_mask[index], is_fed.to(tokens.attention_mask.dtype)], dim=1
        ),
        "position_ids": tokens.position_ids[index, -1:]
        + 1
        + torch.minimum(steps, (sizes[:, None] - 1).clamp(min=0)),
        "past_key_values": cache,
        "use_cache": True,
    }
    if backbone.has_plain_head:
        logits = backbone.head(backbone.body(**inputs)[0][is_fed])
    else:
        logits = backbone.model(**inputs).logits[is_fed]
    wanted = torch.tensor([token for target in targets for token in target[1:]], device=device)
    each = -nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    owner = torch.arange(len(targets), device=device).repeat_interleave(sizes)
    return torch.zeros(len(targets), device=device).index_add(0, owner, each)


def _expanded(cache: Any, index: Tensor) -> Any:
    """Rows of a cache, in a new one; the old one stays as it is."""
    fresh = copy.copy(cache)
    fresh.layers = [_apart(layer) for layer in cache.layers]
    fresh.reorder_cache(index)  # every kind of layer has this one, linear attention too
    return fresh


def _apart(layer: Any) -> Any:
    """A cache's layer of its own over the same tensors: selecting rows replaces them."""
    fresh = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # linear attention keeps its states in these
            setattr(fresh, name, dict(value))
    return fresh
