"""The bare model: the same weights without any hook, and the ways of doing without experts what we do with them."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from dylora_stream.core.messages import Request
from dylora_stream.model.backbone import IGNORED, Backbone, Tokens
from dylora_stream.model.config import GenerationConfig, PoolConfig
from dylora_stream.model.decoding import generate, rank_choices
from dylora_stream.model.features import length_sorted
from dylora_stream.model.mixture import Pool

__all__ = ["answer_barely", "closed_pool", "generate_plainly", "random_tokens", "rank_plainly", "twin"]


def twin(backbone: Backbone) -> Backbone:
    """Another module tree over the same tensors: what hooks or wraps the one leaves the other bare."""
    tensors = chain(backbone.model.parameters(), backbone.model.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return replace(backbone, model=copy.deepcopy(backbone.model, memo))


def closed_pool(backbone: Backbone) -> Pool:
    """A pool that has no hooks and never gates: for loops that ask for one."""
    pool = Pool(backbone, PoolConfig(slots=1, rank=1))
    pool.close()
    return pool


def random_tokens(backbone: Backbone, rows: int, length: int) -> Tokens:
    """Random ids (rows, length) without padding, the same each time."""
    vocabulary = backbone.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(backbone.device)
    return Tokens(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(length, device=ids.device).expand(rows, length),
        labels=torch.full_like(ids, IGNORED),
    )


@torch.no_grad()
def answer_barely(
    backbone: Backbone, pool: Pool, requests: Sequence[Request], generation: GenerationConfig
) -> list[str]:
    """What `MixtureAnswerer.answer` does, without scoring, routing and gates. All with choices or all without."""
    prompts = backbone.prompt_ids([request.input for request in requests])
    targets = [backbone.target_ids(request.choices) for request in requests]
    outputs = [""] * len(requests)
    for rows in length_sorted([len(prompt) for prompt in prompts], generation.micro_batch):
        tokens = backbone.pad([prompts[row] for row in rows])
        if requests[0].choices:
            best = rank_choices(backbone, pool, tokens, [targets[row] for row in rows])
            found = [requests[row].choices[index] for row, index in zip(rows, best, strict=True)]
        else:
            ids = generate(backbone, pool, tokens, generation.max_new_tokens)
            found = [backbone.decode(row) for row in ids]
        for row, output in zip(rows, found, strict=True):
            outputs[row] = output
    return outputs


@torch.no_grad()
def generate_plainly(backbone: Backbone, inputs: Sequence[str], max_new_tokens: int, batch: int) -> None:
    """transformers' own greedy generate, length-sorted."""
    prompts = backbone.prompt_ids(inputs)
    for rows in length_sorted([len(prompt) for prompt in prompts], batch):
        tokens = backbone.pad([prompts[row] for row in rows])
        backbone.model.generate(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=backbone.eos_id,
        )


@torch.no_grad()
def rank_plainly(backbone: Backbone, pairs: Sequence[tuple[str, str]], batch: int) -> None:
    """Every (input, choice) in full, length-sorted, logits at the choices only."""
    prompts = backbone.prompt_ids([text for text, _ in pairs])
    targets = backbone.target_ids([choice for _, choice in pairs])
    lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
    for rows in length_sorted(lengths, batch):
        tokens = backbone.pad([prompts[row] for row in rows], [targets[row] for row in rows])
        backbone.answer_logits(tokens).log_softmax(-1)
