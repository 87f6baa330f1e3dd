"""Generation with another expert a row, over the same loop without gates; transformers' own generate beside it.

No row ends early: the end token is one that the model does not have, so that all write as many tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from dylora_stream.bench.throughput.bare import closed_pool, random_tokens
from dylora_stream.bench.throughput.contenders import Draws, filled_pool
from dylora_stream.bench.throughput.measuring import Bench
from dylora_stream.model.attention import attends_plainly
from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.decoding import generate
from dylora_stream.model.mixture import Pool

__all__ = ["measure_decoding"]

NEVER = 2**31 - 1  # a token that no model writes


def measure_decoding(bench: Bench) -> None:
    """decode_N, and transformers_generate; the reference of all is our loop on the bare model."""
    sizes, bare, serving = bench.config.sizes, bench.bare(), bench.backbone()
    tokens = random_tokens(bare, sizes.rows, sizes.prompt_tokens)
    plain, same = (
        partial(generate, _endless(each), closed_pool(each), tokens, sizes.new_tokens)
        for each in (bare, serving)
    )
    alike = same if attends_plainly(serving.model) else None
    bench.compare("transformers_generate", plain, partial(_transformers, bare, tokens, sizes.new_tokens))
    for size in sizes.main_pools:
        with filled_pool(serving, size, sizes.rank) as (backbone, pool):
            ours = partial(generate, _endless(backbone), pool, tokens, sizes.new_tokens)
            bench.compare(
                f"decode_{size}", plain, partial(_gated, pool, Draws(sizes.rows, size), ours), alike
            )


def _endless(backbone: Backbone) -> Backbone:
    return replace(backbone, tokenizer=SimpleNamespace(eos_token_id=NEVER))


def _gated(pool: Pool, draws: Draws, run: Callable[[], object]) -> None:
    with pool.gated(*draws.next()):
        run()


def _transformers(backbone: Backbone, tokens: Tokens, new_tokens: int) -> Any:
    return backbone.model.generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=NEVER,
        pad_token_id=0,
    )
