"""A batch whose rows all have other experts, over the bare body: ours of every pool's size, dense rows, and PEFT's.

Setting the gates, and with them gathering the experts' blocks, is part of what is timed. The head is not: it is the
same for all, and a served batch computes few of its positions.
"""

from collections.abc import Callable

import torch

from dylora_stream.bench.throughput.bare import random_tokens, twin
from dylora_stream.bench.throughput.contenders import Draws, PeftModel, filled_pool, random_adapter
from dylora_stream.bench.throughput.measuring import Bench
from dylora_stream.model.attention import attends_plainly
from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.config import Dtype
from dylora_stream.model.mixture import Pool

__all__ = ["bare_pass", "gated_pass", "measure_mixed", "mixed_peft", "peft_pass"]


def measure_mixed(bench: Bench) -> None:
    """mixed_N_DTYPE, dense4_DTYPE, peft_mixed_N_DTYPE and peft_one_DTYPE."""
    for dtype in bench.config.sizes.dtypes:
        _of_dtype(bench, dtype)


def _of_dtype(bench: Bench, dtype: Dtype) -> None:
    sizes = bench.config.sizes
    bare, serving = bench.bare(dtype), bench.backbone(dtype)
    tokens = random_tokens(bare, sizes.rows, sizes.tokens)
    first = sizes.main_pools[0]
    for size in sorted({*sizes.main_pools, *(sizes.pools if dtype == bench.dtype else ())}):
        _of_pool(bench, (bare, serving), dtype, size)
    peft = mixed_peft(bare, first, sizes.rank)
    theirs = peft_pass(peft, tokens, Draws(sizes.rows, first))
    bench.compare(f"peft_mixed_{first}_{dtype}", bare_pass(bare, tokens), theirs)
    peft.model.set_adapter("1")
    bench.compare(f"peft_one_{dtype}", bare_pass(bare, tokens), peft_pass(peft, tokens, None))


def _of_pool(bench: Bench, backbones: tuple[Backbone, Backbone], dtype: Dtype, size: int) -> None:
    sizes, (bare, serving) = bench.config.sizes, backbones
    tokens = random_tokens(bare, sizes.rows, sizes.tokens)
    plain = bare_pass(bare, tokens)
    alike = bare_pass(serving, tokens) if attends_plainly(serving.model) else None
    with filled_pool(serving, size, sizes.rank) as (backbone, pool):
        ours = gated_pass(backbone, pool, tokens, Draws(sizes.rows, size))
        bench.compare(f"mixed_{size}_{dtype}", plain, ours, alike)
        if size == sizes.main_pools[0]:
            ours = gated_pass(backbone, pool, tokens, Draws(sizes.rows, size, sizes.members))
            bench.compare(f"dense{sizes.members}_{dtype}", plain, ours, alike)


def bare_pass(backbone: Backbone, tokens: Tokens) -> Callable[[], torch.Tensor]:
    """(B, T, d) states of the body alone."""
    return lambda: backbone.body(**tokens.inputs(), use_cache=False)[0]


def gated_pass(backbone: Backbone, pool: Pool, tokens: Tokens, draws: Draws) -> Callable[[], torch.Tensor]:
    """The same through the pool, with the next draw's experts."""

    def run() -> torch.Tensor:
        pool.set_gates(*draws.next())
        states: torch.Tensor = backbone.body(**tokens.inputs(), use_cache=False)[0]
        return states

    return run


def mixed_peft(bare: Backbone, count: int, rank: int) -> PeftModel:
    """PEFT around a body, with the adapters of `filled_pool`, each named by its slot."""
    backbone = twin(bare)
    peft = PeftModel.around(backbone, backbone.body, rank, alpha=rank)
    for slot in range(1, count + 1):
        peft.add(str(slot), random_adapter(bare, slot, rank))
    return peft


def peft_pass(peft: PeftModel, tokens: Tokens, draws: Draws | None) -> Callable[[], torch.Tensor]:
    """The same through PEFT: a batch of mixed adapters, or without draws the active adapter for all rows."""

    def run() -> torch.Tensor:
        mixed = (
            {} if draws is None else {"adapter_names": [str(slot) for slot in draws.next()[0][:, 0].tolist()]}
        )
        states: torch.Tensor = peft.model(**tokens.inputs(), use_cache=False, **mixed)[0]
        return states

    return run
